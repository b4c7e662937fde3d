"""Count the open_clip models that can be used as backbones: kinds of image towers, and what text encoders need.

    python benchmarks/backbones.py

Towers are built on the meta device, so nothing is downloaded. Takes about a minute.
"""

from __future__ import annotations

from collections import Counter

import common
import open_clip

from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.towers.backbones import Backbone, empty_image_tower, find_backbone


def main() -> None:
    options = common.parser(__doc__).parse_args()
    kinds: Counter[tuple[str, str]] = Counter()
    names = open_clip.list_models()
    for name in names[:2] if options.quick else names:
        backbone = find_backbone(name)
        try:
            kinds["image tower", type(empty_image_tower(backbone, False)).__name__] += 1
        except SettingsError as error:
            kinds["image tower", "refused"] += 1
            print(error)
        kinds["text side", text_side(backbone)] += 1
    rows = [{"side": side, "kind": kind, "models": count} for (side, kind), count in sorted(kinds.items())]
    common.report(options, rows, weights="none")


def text_side(backbone: Backbone) -> str:
    if backbone.plain_text:
        return "CLIP's transformer: prompts and learned contexts"
    if "hf_model_name" in backbone.text:
        return "Hugging Face's encoder: its configuration and tokenizer are downloaded"
    if "hf_tokenizer_name" in backbone.text:
        return "open_clip's transformer with a tokenizer of Hugging Face's, which is downloaded"
    return "open_clip's transformer: prompts"


if __name__ == "__main__":
    main()

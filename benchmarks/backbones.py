"""Which of open_clip's models can be trained and scored with: image towers, and what their text sides need.

    python benchmarks/backbones.py

Towers are built without values, so nothing is downloaded and a minute is enough.
"""

from __future__ import annotations

from collections import Counter

import open_clip
import timm
import versus

from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.towers.backbones import empty_image_tower, find_backbone


def main() -> None:
    kinds: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    names = open_clip.list_models()
    for name in names:
        backbone = find_backbone(name)
        try:
            kinds[type(empty_image_tower(backbone, False)).__name__] += 1
        except SettingsError as error:
            kinds["refused"] += 1
            print(error)
        if backbone.plain_text:
            texts["CLIP's: prompts and learned contexts"] += 1
        elif "hf_model_name" in backbone.text:
            texts["Hugging Face's: its configuration and tokenizer are fetched"] += 1
        elif "hf_tokenizer_name" in backbone.text:
            texts["open_clip's, with a tokenizer of Hugging Face's, which is fetched"] += 1
        else:
            texts["open_clip's: prompts"] += 1
    print(f"\n{len(names)} models of open_clip {open_clip.__version__}, timm {timm.__version__}; {versus.machine()}")
    for title, counts in (("image tower", kinds), ("text side", texts)):
        print(f"\n| {title} | models |\n|---|---|")
        for kind, count in counts.most_common():
            print(f"| {kind} | {count} |")


if __name__ == "__main__":
    main()

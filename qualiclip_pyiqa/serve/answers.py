"""What the server answers: the models of its JSON, which its OpenAPI page describes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from ..explain.quality_map import QualityMap
from .maps import data_url, overlay

MapForm = Literal["values", "png"]


class MapAnswer(BaseModel):
    """A quality map: local scores of one attribute. A larger value is better."""

    metric: str
    attribute: str
    low: float = Field(description="lower end of a colour bar's scale")
    high: float = Field(description="upper end of a colour bar's scale")
    meaning: str
    relation: str = Field(description="how the values relate to the score")
    own_scale: bool = Field(description="whether the values are of another scale than the image's score")
    note: str | None = Field(description="one line if maps of an image of this size can mislead, else null")
    step: tuple[float, float] = Field(description="height and width of a place in pixels of the image")
    values: Annotated[list[list[float]] | None, Field(description="values of places, row by row (map=values)")] = None
    png: Annotated[
        str | None, Field(description="data URL of an overlay in the image's proportions; bad places are red (map=png)")
    ] = None


class ImageAnswer(BaseModel):
    """The scores of one image, or the reason why there are none."""

    name: Annotated[str | None, Field(description="of the file, if the request names it")] = None
    width: Annotated[int | None, Field(description="pixels, as scored")] = None
    height: Annotated[int | None, Field(description="pixels, as scored")] = None
    scores: Annotated[
        dict[str, float], Field(description="score by column: METRIC, or METRIC.ATTRIBUTE if it has several")
    ] = {}
    lower_better: Annotated[
        dict[str, bool], Field(description="by column: whether a lower score means a better image")
    ] = {}
    meanings: Annotated[
        dict[str, str],
        Field(description="by column: what a score says, such as 'higher is brighter'"),
    ] = {}
    error: Annotated[str | None, Field(description="one line; null if every metric scored the image")] = None
    map: MapAnswer | None = None


class ImagesAnswer(BaseModel):
    """The scores of a form's files, in their order."""

    images: list[ImageAnswer]


class ErrorAnswer(BaseModel):
    """Why a request was not answered."""

    error: str


def map_answer(found: QualityMap, form: MapForm) -> MapAnswer:
    """Convert a map to what is answered."""
    return MapAnswer(
        metric=found.metric,
        attribute=found.attribute,
        low=found.low,
        high=found.high,
        meaning=found.meaning,
        relation=found.relation,
        own_scale=found.own_scale,
        note=found.note,
        step=found.step,
        values=[[float(f"{value:.6g}") for value in row] for row in found.values] if form == "values" else None,
        png=data_url(overlay(found)) if form == "png" else None,
    )

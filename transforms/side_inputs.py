"""Side inputs that every runner fills."""

from __future__ import annotations

from typing import Any

import apache_beam as beam
from apache_beam.pvalue import AsList, PCollection


def listed(elements: PCollection[Any], label: str) -> AsList:
    """The elements as a list, for use as a side input: of a PCollection that nothing else consumes.

    FnApiRunner (Beam 2.77) now and then hands out an empty list for a PCollection that is also the main input of some
    other stage: it takes that stage, which reads the elements, for the one that makes them, and looks for them once
    they have been consumed.
    """
    return AsList(elements | label >> beam.Map(_itself))


def _itself(element: Any) -> Any:
    return element

"""Quantizers of installed packages, found by entry point."""

from __future__ import annotations

from importlib.metadata import entry_points

from finetune.errors import EnvironmentFault
from finetune.quantizers.base import Quantizer
from finetune.recipe.sections.quantization import PluginQuantization

GROUP = "ft.quantizers"


def installed_quantizer(section: PluginQuantization) -> Quantizer:
    """The quantizer that an installed package registers under the section's name, constructed from the section.

    Only installed packages have entry points: a recipe chooses one by name and contains no code.

    Raises:
        EnvironmentFault: No installed package registers the name, or several do, or it is no quantizer.
    """
    found = entry_points(group=GROUP, name=section.name)
    if len(found) != 1:
        names = ", ".join(sorted({point.name for point in entry_points(group=GROUP)})) or "none"
        packages = ", ".join(sorted(point.dist.name for point in found if point.dist))
        raise EnvironmentFault(
            f"several installed packages register the quantizer {section.name!r}: {packages}"
            if found
            else f"no installed package registers the quantizer {section.name!r}",
            where="quantization.name",
            hint="uninstall all but one of them"
            if found
            else f"install the package that does; registered are: {names}",
        )
    (point,) = found
    quantizer = point.load()(section)
    if not isinstance(quantizer, Quantizer):
        raise EnvironmentFault(
            f"the entry point {section.name!r} ({point.value}) does not return a Quantizer",
            where="quantization.name",
            hint="it must return a finetune.quantizers.layer.PackedQuantizer",
        )
    return quantizer

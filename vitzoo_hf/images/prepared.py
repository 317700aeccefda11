"""A blueprint together with its image sets, which are loaded once and handed down to everything that needs them.

Costs: an image set is read when it is first asked for and stays in memory as long as the prepared blueprint does.
Sets that `decode: on_demand` keeps encoded stay encoded. Every process prepares its own: image sets are not pickled.
"""

from dataclasses import dataclass, field

from vitzoo_hf.blueprint.blueprint import Blueprint, Run
from vitzoo_hf.images.sources import ImageSet, load_images


@dataclass(frozen=True, eq=False)
class PreparedBlueprint:
    """A blueprint that carries its image sets.

    Attributes:
        blueprint: the plan of the zoo.

    Example:
        >>> prepared = PreparedBlueprint(Blueprint.load("mini"))
        >>> prepared.images("digits") is prepared.images("digits"), prepared.num_classes("digits")
        (True, 10)
    """

    blueprint: Blueprint
    _image_sets: dict[str, ImageSet] = field(default_factory=dict, init=False, repr=False)

    def images(self, name: str) -> ImageSet:
        """The image set of this name in the blueprint, loaded at the first call.

        Raises:
            ZooError: if the images cannot be had on this machine, with how to get them.
        """
        if name not in self._image_sets:
            self._image_sets[name] = load_images(name, self.blueprint.images[name])
        return self._image_sets[name]

    def images_of(self, run: Run) -> ImageSet:
        """The image set that a run trains on; see `images`."""
        return self.images(run.images)

    def num_classes(self, name: str) -> int:
        """Number of classes of an image set; its images are loaded only where the blueprint does not give it.

        Raises:
            ZooError: if the images are needed and cannot be had on this machine.
        """
        spec = self.blueprint.images[name]
        if spec.is_world:
            return 2  # a world's label is whether the class is in the first or the second half
        return spec.classes or len(self.images(name).class_names)

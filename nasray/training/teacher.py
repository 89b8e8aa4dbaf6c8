"""A fixed network whose soft labels teach others. Plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from nasray import checkpoint
from nasray.data.splits import JobImages
from nasray.data.transforms import resized
from nasray.errors import UserError
from nasray.evaluation.evaluate import fold_bn, recalibrate_bn
from nasray.spaces.space import largest


@dataclass(frozen=True)
class Teacher:
    """A network in eval mode: maps normalised images of any size to logits (n, classes)."""

    network: nn.Module
    resolution: int  # to which it has images scaled, pixels

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (n, classes) of float images (n, 3, height, width)."""
        return self.network(resized(images, self.resolution))


def load_teacher(path: str, images: JobImages, device: str) -> Teacher:
    """Load a retrained network, or the largest subnet of a supernet, onto `device`.

    The BN of a supernet's is recalibrated on the images that validate the job's supernet.

    Raises:
        UserError: the file is absent or damaged, or of other classes than the images.
    """
    teacher, is_subnet = read_teacher(path, images.dataset.classes)
    teacher.network.to(device)
    if not is_subnet:
        job, images = images.job, replace(images, other_resolution=teacher.resolution)
        calibration = images.calibration(job.supernet.val_calibration_images)
        size = job.search.batch_size
        recalibrate_bn(teacher.network, calibration, batch_size=size, device=device)
    fold_bn(teacher.network)
    teacher.network.requires_grad_(False)
    return teacher


def read_teacher(path: str, classes: Sequence[str]) -> tuple[Teacher, bool]:
    """Read a teacher of `classes`, on the CPU, and whether its file holds a single network.

    Raises:
        UserError: the file is absent or damaged, or of other classes.
    """
    content = checkpoint.load(path)
    is_subnet = isinstance(content, dict) and "arch" in content
    if is_subnet:
        space, arch, network, extra = checkpoint.subnet_of(content, path)
    else:
        supernet = checkpoint.supernet_of(content, path)
        space, arch = supernet.space, largest(supernet.space)
        network, extra = supernet.extract(arch), content
    known = list(extra.get("classes", classes))
    if len(classes) != space.num_classes or known != list(classes):
        raise UserError(
            f"{path} knows {space.num_classes} classes, but not those {len(classes)} of the data "
            "set, so it cannot teach them; name a network that was trained on this data set"
        )
    return Teacher(network, space.resolution_of(arch)), is_subnet

"""Design spaces: `nasray.space` with costs, samples and supernet; `nasray.load`, one network."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nasray.config import Limit, parse_job
from nasray.costs.micronet import INT8_KINDS
from nasray.errors import UserError
from nasray.storage import files as storage

if TYPE_CHECKING:
    from torch import nn

    from nasray.costs.micronet import Int8, Score
    from nasray.costs.operations import OpCount
    from nasray.spaces.space import Architecture, Space
    from nasray.spaces.supernet import Supernet

# A published name, JSON text, an object in the field's keys, or one choice index per gene.
AnyArchitecture = str | Mapping[str, Any] | Sequence[int]


def load(
    path: str | os.PathLike[str],
    *,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> "nn.Module":
    """Load a retrained network, RUN_DIR/retrain/<k>/model.pt, in eval mode on the CPU.

    Input: float32 (batch, 3, resolution, resolution), RGB from 0 to 1; normalisation is part of
    the module. Output: float32 logits (batch, classes). Its attributes `classes` (names, in the
    order of the logits), `resolution` (pixels) and `arch` (JSON object) describe the network;
    `network` is the part behind the normalisation.

    With features_only, as a backbone of other programs and by timm's conventions: the head is
    left out, and the output is a list of feature maps, finest first, one per reduction of the
    resolution (2, 4, 8, 16, 32; as far as the network goes), each the output of the last block at
    that resolution. Its `feature_info` has channels(), reduction() and module_name(). Images may
    be of any height and width that are multiples of 32 pixels. `classes` is empty.

    Args:
        path: of model.pt, a path or URI.
        features_only: leave the head out and return feature maps.
        out_indices: which feature maps, with features_only: indices from 0, the finest one, or
            negative ones from the coarsest. Blocks that none of them needs are left out.
        num_classes: begin with a new classifier for so many classes; `classes` is then empty.
        seed: the weights of that classifier are drawn from it.

    Raises:
        UserError: there is no such file, it holds no single network, or the options contradict
            one another or are out of range.
    """
    if features_only and num_classes is not None:
        raise UserError(
            f"features_only and num_classes = {num_classes}: feature maps have no classifier; "
            "leave one of them out"
        )
    if out_indices is not None and not features_only:
        raise UserError(f"out_indices = {out_indices!r} needs features_only=True")
    if num_classes is not None and (num_classes < 1 or seed < 0):
        raise UserError(f"num_classes = {num_classes} must be 1 or more, seed = {seed} 0 or more")
    from nasray import checkpoint
    from nasray.export import Normalised
    from nasray.features import FeatureNetwork
    from nasray.pretrained.start import with_new_classifier

    space, arch, subnet, extra = checkpoint.load_subnet(os.fspath(path))
    network: nn.Module = subnet
    classes = list(extra.get("classes", ()))
    if features_only:
        network, classes = FeatureNetwork(subnet, out_indices), []
    elif num_classes is not None:
        network, classes = with_new_classifier(space, arch, subnet, num_classes, seed=seed), []
    model: Any = Normalised(network).eval()
    model.classes = classes
    model.resolution = space.resolution_of(arch)
    model.arch = space.to_json(arch)
    if isinstance(network, FeatureNetwork):
        model.feature_info = network.feature_info
    return model


def load_supernet(path: str | os.PathLike[str]) -> "Supernet":
    """Load a supernet, RUN_DIR/supernet.pt or what `nasray import-weights` wrote, in eval mode.

    supernet(images, arch) maps float32 (batch, 3, resolution, resolution), normalised, to logits
    (batch, classes) by the subnet `arch`; supernet.extract(arch) is that subnet as a network of
    its own. `arch` is one choice index per gene, as supernet.space.from_json() and
    nasray.DesignSpace(supernet.space).architecture() return it. The weights are on the CPU.

    Raises:
        UserError: there is no such file, it holds no supernet, or weights that are not finite.
    """
    from nasray import checkpoint

    return checkpoint.load_supernet(os.fspath(path))


def space(name: str, **options: Any) -> "DesignSpace":
    """Return the design space `name`, as `nasray spaces` lists them.

    `options` are those of a job's [space] section and `num_classes`, e.g. resolution=160.

    Raises:
        UserError: an unknown space or option, or an invalid value.
    """
    from nasray.spaces import space_by_name

    return DesignSpace(space_by_name(name, **options))


@dataclass(frozen=True)
class DesignSpace:
    """A design space with its costs, from `nasray.space`. `space` is the Space itself.

    An architecture is given as a published name, JSON text, an object in the field's keys, or
    one choice index per gene.
    """

    space: "Space"

    def architecture(self, arch: AnyArchitecture) -> "Architecture":
        """Return `arch` as one choice index per gene.

        Raises:
            UserError: it is no architecture of this space.
        """
        from nasray.spaces.space import check_architecture

        if isinstance(arch, Mapping):
            return self.space.from_json(arch)
        if not isinstance(arch, str):
            return check_architecture(arch, self.space)
        named = self.space.named
        if arch in named:
            return named[arch]
        try:
            values = json.loads(arch)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise UserError(
                f"ARCH {arch!r} is neither a published name ({', '.join(named)}) nor a JSON object"
            )
        return self.space.from_json(values)

    def describe(self, arch: AnyArchitecture) -> dict[str, Any]:
        """Return `arch` as a JSON object in the field's keys."""
        return self.space.to_json(self.architecture(arch))

    def profile(self, arch: AnyArchitecture) -> "list[OpCount]":
        """Return parameters and operations of `arch`, operation by operation."""
        from nasray.costs.profile import profile

        return profile(self.space, self.architecture(arch))

    def costs(self, arch: AnyArchitecture) -> dict[str, float]:
        """Return all costs of `arch` for one image: params, macs, MicroNet scores and others."""
        from nasray.costs.profile import total

        return total(self.profile(arch))

    def micronet(
        self, arch: AnyArchitecture, *, int8: "Int8" = INT8_KINDS, strict: bool = False
    ) -> "list[Score]":
        """Return the MicroNet Challenge's scores of `arch` at fp32, fp16 and int8.

        A score has `precision`, `accumulator`, `score`, and the counts that it is of: `params`,
        `mults`, `adds` and their sum `ops`, in which 32 bits are 1.

        Args:
            arch: the architecture.
            int8: what of it is int8: kinds of operations (`kind` in `profile`), or a function
                that says so of each operation.
            strict: also count biases that folding BN leaves, SE's products and residual sums.

        Raises:
            UserError: it is no architecture of this space, or has no operation of a kind in `int8`.
        """
        from nasray.costs import micronet

        ops = self.profile(arch)
        return micronet.scores(micronet.strict(ops) if strict else ops, int8)

    def sample(
        self,
        number: int,
        *,
        limits: Sequence[Mapping[str, Any] | Limit] = (),
        latency_table: str = "",
        seed: int = 0,
    ) -> "list[Architecture]":
        """Draw different random architectures; fewer if no more are within the limits.

        Args:
            number: how many.
            limits: as search.limits in a job, e.g. [{"cost": "macs", "max": 330e6}].
            latency_table: path of a table that makes latency_ms (milliseconds) a cost.
            seed: the same seed draws the same architectures.

        Raises:
            InfeasibleError: no architecture is within the limits.
            UserError: an invalid limit, number or seed.
        """
        if number < 1 or seed < 0:
            raise UserError(f"number = {number} must be 1 or more, seed = {seed} 0 or more")
        import numpy as np

        from nasray.costs.latency import LatencyTable
        from nasray.search.limits import Limits

        given = [limit.model_dump() if isinstance(limit, Limit) else limit for limit in limits]
        job = parse_job({"data": {"source": "synthetic"}, "search": {"limits": given}}, "limits")
        table = LatencyTable.load(latency_table, self.space) if latency_table else None
        drawn = Limits(self.space, job.search.limits, table)
        return drawn.draw(number, np.random.default_rng(seed), set())

    def supernet(self, *, seed: int = 0) -> "Supernet":
        """Build a supernet with initial weights drawn from `seed`.

        supernet(images, arch) maps float32 (batch, 3, resolution, resolution), normalised, to
        logits (batch, classes).
        """
        import torch

        supernet = self.space.supernet()
        self.space.initialize(supernet, torch.Generator().manual_seed(seed))
        return supernet

    def import_weights(
        self, path: str | os.PathLike[str], out: str | os.PathLike[str], *, sha256: str = ""
    ) -> None:
        """Write the supernet of this space with the weights in `path` to `out`.

        Args:
            path: a published file or nasray's supernet.pt: a local path, a URI of a storage, or
                an http(s) address. docs/pretrained.md says which files are known.
            out: a path or URI; load_supernet() and a job take this file.
            sha256: the digest that the file must have, in hexadecimal, if given.

        Raises:
            UserError: the file cannot be read, is not of this space and its number of classes, or
                has another digest; or `out` exists with other content.
        """
        from nasray import checkpoint
        from nasray.pretrained.start import start_from

        out = os.fspath(out)
        exists = storage.exists(out)  # before a long download: it may be no place to write to
        supernet = start_from(self.space, os.fspath(path), sha256=sha256, seed=None).supernet
        if not exists:
            checkpoint.save_supernet(out, supernet)
        elif not _holds(out, supernet):
            raise UserError(f"{out} exists with other content; remove it or give another name")

    def extract(self, supernet: "Supernet", arch: AnyArchitecture) -> "nn.Sequential":
        """Return `arch` as a network of its own, with a copy of its weights in `supernet`."""
        return supernet.extract(self.architecture(arch))

    def export(
        self,
        supernet: "Supernet",
        arch: AnyArchitecture,
        path: str | os.PathLike[str],
        *,
        images: str | os.PathLike[str],
        classes: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Write `arch` with its weights in `supernet` as ONNX; return the check against torch.

        Its BN statistics become those of `images`: the supernet's own are of many subnets and
        fit none. Nothing is trained, and no accuracy is measured. The file takes float32
        (batch, 3, resolution, resolution), RGB from 0 to 1, and returns logits (batch, classes).

        Args:
            supernet: of this space; it stays as it is.
            arch: the subnet.
            path: a path or URI.
            images: a folder or URI with images, however deep, of the kind that the network is
                for; at least 2, and 2,000 spread over it if there are more.
            classes: their names in the order of the logits; "0", "1" and so on without them.

        Raises:
            UserError: an image cannot be decoded or there are too few, the names are not as many
                as the classes, or the [export] extra is not installed.
            ExportError: onnxruntime and torch disagree (nasray.export); no file is written.
        """
        from nasray.pipeline.export_subnet import export_subnet

        return export_subnet(
            supernet,
            self.architecture(arch),
            os.fspath(path),
            images=os.fspath(images),
            classes=classes,
        )


def _holds(path: str, supernet: "Supernet") -> bool:
    """Whether the file at `path` is that of `supernet`."""
    from nasray import checkpoint

    try:
        found = checkpoint.load_supernet(path, supernet.space).state_dict()
    except (UserError, OSError):  # damaged, something else, or a folder
        return False
    return all(tensor.equal(found[name]) for name, tensor in supernet.state_dict().items())

"""Places a run's model and rows on one device or a mesh, in one process or several."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import equinox_mtp as emtp
from equinox_mtp.sharding import (
    DEFAULT_RULES,
    ShardingRules,
    batch_sharding,
    constrain_model,
    make_mesh,
    parameter_shardings,
    reorder,
    restore,
    use_rules,
    zigzag_order,
)

from ._config import TrainConfig
from ._packing import PackedRows, Rows

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules for it; without a mesh everything is on one device."""

    mesh: Mesh | None
    rules: ShardingRules

    @classmethod
    def of(cls, config: TrainConfig, vocab_size: int) -> "Placement":
        """What `config.mesh` says.

        **Raises:** `ValueError` if it does not fit the devices, or a batch does not fit it.
        """
        if config.mesh is None:
            if jax.process_count() > 1:
                raise ValueError(
                    f"`mesh` must be given for {jax.process_count()} processes; got none. Pass "
                    f"--mesh data={jax.device_count()}, for instance."
                )
            return cls(None, DEFAULT_RULES)
        try:
            mesh = make_mesh(parse_mesh(config.mesh))
            DEFAULT_RULES.head_sharding(mesh)
        except ValueError as error:
            raise ValueError(f"`mesh` {config.mesh} does not fit: {error}") from error
        rules = DEFAULT_RULES
        # Ids that are drafted are picked from all: each device has the whole output head then.
        if vocab_size % rules.num_shards("vocab", mesh) or config.draft_vocab is not None:
            rules = rules.replace(vocab=None)
        rows, positions = rules.num_shards("batch", mesh), rules.num_shards("seq", mesh)
        if config.batch_size // config.accumulate % rows:
            raise ValueError(
                f"`batch_size` must be a multiple of `accumulate` times the {rows} devices over "
                f"which --mesh {config.mesh} splits rows; got {config.batch_size}, in "
                f"{config.accumulate} microbatch(es)."
            )
        if positions > 1 and config.objective != "cross_entropy":
            raise ValueError(
                f"`objective` {config.objective!r} compares each depth with the main model some "
                f"positions later, in the order of the text; got --mesh {config.mesh}, which "
                "reorders and splits positions. Leave `context` out of it."
            )
        if positions > 1 and (config.model is not None or config.architecture is not None):
            raise ValueError(
                "`mesh` must not split positions over `context` with a `model` or `architecture`, "
                "whose attention needs them in the order of the text; got --mesh "
                f"{config.mesh}. Split rows over data and fsdp."
            )
        if positions > 1 and config.seq_len % (2 * positions):
            raise ValueError(
                f"`seq_len` must be a multiple of twice the {positions} devices over which --mesh "
                f"{config.mesh} splits positions; got {config.seq_len}."
            )
        return cls(mesh, rules)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Sets the mesh, and the rules for it."""
        if self.mesh is None:
            yield
        else:
            with jax.set_mesh(self.mesh), use_rules(self.rules):
                yield

    def transformer(self, config: TrainConfig, vocab_size: int) -> emtp.nn.TransformerConfig:
        """The main model's configuration, with an attention that follows reordered positions."""
        transformer = config.transformer(vocab_size)
        if self._num_shards_of_positions == 1:
            return transformer
        return dataclasses.replace(transformer, attention=emtp.nn.causal_attention_by_position)

    def constrain(self, tree: Tree) -> Tree:
        """Parameters, in `jit`, where they belong."""
        return tree if self.mesh is None else constrain_model(tree, self.mesh, self.rules)

    def place(self, shapes: Tree) -> Tree:
        """Parameters as `jax.ShapeDtypeStruct`s, with the shardings that the rules give them."""
        if self.mesh is None:
            return shapes

        def place(x: Any, sharding: Any) -> Any:
            if sharding is None:
                return x
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        shardings = parameter_shardings(shapes, self.mesh, self.rules)
        return jax.tree.map(place, shapes, shardings, is_leaf=lambda x: x is None)

    def reorder(self, tree: Tree) -> Tree:
        """Positions `[… batch seq]`, in `jit`: in the order in which they are split, and split."""
        if self.mesh is None:
            return tree
        return jax.tree.map(self._split, reorder(tree, self._order_of(tree)))

    def restore(self, tree: Tree) -> Tree:
        """Positions in the order of the text."""
        return tree if self.mesh is None else restore(tree, self._order_of(tree))

    def load(self, rows: PackedRows, indices: np.ndarray) -> Rows:
        """Rows `[… batch]`; each process reads those of its own devices."""
        mesh = self.mesh
        if mesh is None:
            return rows.read(indices)
        num_rows = indices.shape[-1]
        sharding = batch_sharding(
            mesh, self.rules, " ".join(["_"] * (indices.ndim - 1) + ["batch", "_"])
        )
        parts = functools.cache(lambda start, stop: rows.read(indices[..., start:stop]))

        def of_devices(field: Callable[[Rows], Any]) -> jax.Array:
            def of_device(where: Any) -> np.ndarray:
                return field(parts(*where[-2].indices(num_rows)[:2]))

            width = field(parts(0, 0)).shape[-1]
            return jax.make_array_from_callback((*indices.shape, width), sharding, of_device)

        return Rows(
            tokens=of_devices(lambda part: part.tokens),
            segment_ids=of_devices(lambda part: part.segment_ids),
        )

    def on_one_device(self, model: emtp.MTPModel) -> emtp.MTPModel:
        """A model that was never split, on one device of each process."""
        if self.mesh is None:
            return model
        arrays, static = eqx.partition(model, eqx.is_array)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        whole = jax.jit(lambda arrays: arrays, out_shardings=everywhere)(arrays)
        return eqx.combine(jax.tree.map(lambda x: x.addressable_data(0), whole), static)

    @property
    def _num_shards_of_positions(self) -> int:
        return 1 if self.mesh is None else self.rules.num_shards("seq", self.mesh)

    def _order_of(self, tree: Any) -> np.ndarray:
        seq = jax.tree.leaves(tree)[0].shape[-1]
        shards = self._num_shards_of_positions
        return zigzag_order(seq, shards) if shards > 1 else np.arange(seq)

    def _split(self, x: jax.Array) -> jax.Array:
        assert self.mesh is not None
        words = " ".join(["_"] * (x.ndim - 2) + ["batch", "seq"])
        return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh, self.rules, words))


ONE_DEVICE = Placement(None, DEFAULT_RULES)


@contextlib.contextmanager
def on_no_mesh() -> Iterator[None]:
    """Neither mesh nor rules: JAX refuses arrays of one device where a mesh is set."""
    with jax.set_mesh(None), use_rules(None):
        yield


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=2,fsdp=4"` as sizes by name.

    **Raises:** `ValueError` if it is not of that form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.strip() or not size.strip().isdecimal() or name.strip() in sizes:
            raise ValueError(
                f"`mesh` must name each axis once with its size, as data=2,fsdp=4; got {text!r}."
            )
        sizes[name.strip()] = int(size)
    return sizes

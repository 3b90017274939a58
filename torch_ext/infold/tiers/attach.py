"""Lets a model run with its weights where a plan puts them."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from infold.report import format_bytes
from infold.storages import enter, leave, refuse_attached
from infold.tiers.arena import Arena
from infold.tiers.checkpoint import Weights, fill_buffers, filled, open_weights
from infold.tiers.codecs import RAW, config_of
from infold.tiers.cuda import CudaPiece, Lane, device_memory
from infold.tiers.emulate import EmulatedPiece, link_for, no_memory
from infold.tiers.engine import Counters, Engine
from infold.tiers.hooks import Hooks, refuse_hooked
from infold.tiers.pieces import DiskPiece, Piece, RamPiece
from infold.tiers.plan import Plan, require_plan_of
from infold.tiers.ring import Buffers, Ring, host_memory
from infold.tiers.spec import TierSpec
from infold.tiers.store import Store
from infold.tiers.training import note_steps, state_name, step_by_units
from infold.tiers.units import ATOMIC, Unit, units
from infold.tiers.unpacking import PackedPiece, can_pack

Mode = Literal["real", "emulated"]

_REMOVE = "call remove() of its handle first"
#: Weights that are freed before the system is given back their memory.
_TRIM_BYTES = 4 << 20


@torch.inference_mode(False)
def attach(
    model: nn.Module,
    plan: Plan,
    *,
    mode: Mode = "real",
    folder: str | Path | None = None,
    weights: Weights | str | Path | None = None,
    materialize: bool = False,
    atomic: Collection[type[nn.Module]] = ATOMIC,
    backend: str = "auto",
) -> Handle:
    """Moves a model's weights to the tiers of ``plan``, and fetches them while the model runs.

    mode: ``"real"`` moves them; ``"emulated"`` leaves them and waits as the tiers' specifications say.
    folder: where a tier on disk keeps its file; the default is `tempfile.gettempdir`, ``$TMPDIR`` or else /tmp, which
        on some systems is in RAM.
    weights: what a model on the meta device is filled with, a unit at a time, so that it is never whole in memory: a
        safetensors file, a folder of them, or a mapping from qualified names to tensors.
    materialize: stores weights packed and decodes each layer into a buffer just before it runs: by the codec that the
        plan gives it, else losslessly. What trains is stored as it is. Without it a plan's codecs only say how layers
        were converted (`infold.convert`), which compute on the packed weight. On a CPU alone.
    backend: of `infold.tiers.Store`.

    Outputs and gradients keep their bits. Raises ValueError where plan and model do not name the same units, and
    RuntimeError where the disk has no room; the model is as it was then.
    """
    if mode not in ("real", "emulated"):
        raise ValueError(f"mode: expected 'real' or 'emulated', got {mode!r}")
    if materialize and _device(model).type != "cpu":
        advice = "pack its layers with infold.convert instead"
        raise ValueError(f"materialize: expected a model on the CPU, got one on {_device(model).type}; {advice}")
    found = {unit.name: unit for unit in units(model, atomic)}
    require_plan_of("plan", plan, model, found)
    refuse_attached(model, _REMOVE)
    refuse_hooked(model, _REMOVE)  # its parameters may have been replaced since
    note_steps()
    handle = Handle(model, plan, found, mode, materialize, folder, backend)
    try:
        handle._place_all(open_weights(weights))
    except BaseException:
        handle.remove()
        raise
    return handle


class Handle:
    """A model whose weights lie in tiers. A context manager; `remove` ends it.

    Parameters are used by calling the model. Whoever reads or writes one elsewhere (`state_dict`, an optimizer) does so
    where it lives, slowly but rightly; only writes by way of ``parameter.data`` have to be followed by `refresh`.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        found: Mapping[str, Unit],
        mode: Mode,
        materialize: bool,
        folder: str | Path | None,
        backend: str,
    ) -> None:
        self.model = model
        self.plan = plan
        self.mode = mode
        self.materialize = materialize
        self._units = dict(found)
        self._folder = Path(folder or tempfile.gettempdir())
        self._backend = backend
        self._store: Store | None = None
        self._executor = ThreadPoolExecutor(1, "infold-tiers")
        self._device = _device(model)
        # Emulated weights lie in no memory, and so have no places that matter.
        self._ring: Buffers = (
            Ring(plan.buffer_bytes, no_memory)
            if mode == "emulated"
            else Arena(plan.buffer_bytes, device_memory(self._device) if self._device.type == "cuda" else host_memory)
        )
        self._engine = Engine({}, self._ring)
        self._hooks = Hooks(self._engine, model)
        self._links = {spec.name: link_for(spec, self._device) for spec in plan.tiers if not spec.resident}
        self._lane = Lane(self._device, self._executor) if mode == "real" and self._device.type == "cuda" else None
        self._tier_of: dict[str, str] = {}
        self._removed = False

    # --- placing ---

    def _place_all(self, weights: Weights | None) -> None:
        away = [unit for unit in self._units.values() if not self.plan.tier_of(unit.name).resident]
        on_disk = sum(unit.room for unit in away if self.plan.tier_of(unit.name).on_disk)
        if self.mode == "real" and on_disk:
            self._store = self._open_store(on_disk)
        fill_buffers(self.model, weights)
        freed = 0
        for name, unit in self._units.items():
            self._units[name] = filled(unit, weights)
            enter(self._units[name].parameters.values())
            self._place(self._units[name], self.plan.tier_of(name))
            freed += unit.nbytes
            if freed > _TRIM_BYTES:
                _trim()
                freed = 0
        _trim()

    def _place(self, unit: Unit, spec: TierSpec) -> None:
        if not spec.resident:
            parameters = list(unit.parameters.values())
            packs = self.materialize and self.mode == "real" and any(map(can_pack, parameters))
            packed = self._packed_piece(unit, spec) if packs else None
            piece = packed or self._piece(unit.name, parameters, unit.nbytes, spec)
            if piece.nbytes > self._ring.capacity:
                piece.restore()
                needed, got = f"{piece.nbytes:,}", f"{self._ring.capacity:,}"
                why = "; a packed weight needs room decoded and packed" if packed else ""
                raise ValueError(f"plan: {unit.name}: expected buffer_bytes of at least {needed}, got {got}{why}")
            self._engine.add(unit.name, piece)
            self._hooks.add(unit)
        self._tier_of[unit.name] = spec.name

    def _piece(self, name: str, tensors: Sequence[Tensor], nbytes: int, spec: TierSpec) -> Piece:
        if self.mode == "emulated":
            placed = self.plan.placements.get(name)
            return EmulatedPiece(tensors, placed.nbytes if placed else nbytes, self._links[spec.name])
        if spec.on_disk:
            self._store = self._store or self._open_store(0)
        store = self._store if spec.on_disk else None
        if self._lane:
            return CudaPiece(tensors, self._lane, store)
        return DiskPiece(tensors, store) if store else RamPiece(tensors, self._executor)

    def _packed_piece(self, unit: Unit, spec: TierSpec) -> Piece:
        codec = self.plan.placements[unit.name].codec
        config = config_of("lossless" if codec == RAW else codec)
        assert config is not None
        store = (self._store or self._open_store(0)) if spec.on_disk else None
        self._store = store or self._store
        return PackedPiece(unit.parameters.values(), config, self._executor, store)

    def _open_store(self, nbytes: int) -> Store:
        depth = next(spec.depth for spec in self.plan.tiers if spec.on_disk)
        return Store(self._folder, nbytes, depth=depth, backend=self._backend)

    def move(self, name: str, tier: str) -> int:
        """Puts a unit into another tier of the plan's; the bytes that moved. Not while the model runs.

        Raises ValueError for a unit or a tier that is not there, RuntimeError where the disk has no room: the unit
        is in the first tier then.
        """
        self._require_attached()
        unit, spec = self._unit(name), self._tier(tier)
        if self._tier_of[name] == tier:
            return 0
        self._bring_back(unit)
        self._tier_of[name] = self.plan.tiers[0].name
        self._place(unit, spec)
        return unit.nbytes

    def tiers(self) -> dict[str, str]:
        """The tier that each unit is in."""
        return dict(self._tier_of)

    # --- training ---

    def step(self, optimizer: Optimizer) -> None:
        """``optimizer.step()`` a unit at a time: its parameters are brought here, stepped and written back. What the
        optimizer keeps for them lives in their tier.

        For optimizers that treat each parameter by itself, as Adam and SGD do. Hooks of the optimizer run once a unit.
        Raises ValueError for one that needs a closure (LBFGS) or has none of the model's parameters.
        """
        self._require_attached()
        step_by_units(optimizer, self._away(), self._engine, self._keep_state)

    def _away(self) -> list[Unit]:
        return [self._units[name] for name in self._engine.names if name in self._units]

    def _keep_state(self, unit: Unit, name: str, tensors: list[Tensor]) -> None:
        if name in self._engine.names:
            self._engine.send_home(name).restore()
            self._engine.forget(name)
        nbytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        self._engine.add(name, self._piece(name, tensors, nbytes, self._tier(self._tier_of[unit.name])))

    # --- looking, ending ---

    def refresh(self) -> None:
        """Has everything fetched anew: after writes by way of ``parameter.data``, which PyTorch does not note.

        Writes inside a module's forward are in memory that is lost after it: call this before it ends.
        """
        self._require_attached()
        self._engine.refresh()

    @property
    def counters(self) -> Counters:
        """What was fetched and written, and how long computing waited for it."""
        return self._engine.counters

    def store_stats(self) -> dict[str, int]:
        """What the disk tier's file has seen; empty where there is none."""
        return self._store.stats() if self._store else {}

    def remove(self) -> None:
        """Brings every parameter back into plain memory, bit for bit, and takes the hooks off. Does it once.

        What cannot be read is not-a-number, and raises an error that names the file, after all else is back.
        """
        if self._removed:
            return
        self._hooks.clear()
        errors: list[RuntimeError] = []
        for name in self._engine.names:
            try:
                self._engine.send_home(name).restore()
            except RuntimeError as error:
                errors.append(error)
            # An interrupt before this leaves the rest to a second call.
            self._engine.forget(name)
        for unit in self._units.values():
            leave(unit.parameters.values())
        self._removed = True
        self._ring.clear()
        self._executor.shutdown()
        if self._store:
            self._store.close()
        _trim()
        if errors:
            raise errors[0]

    def __repr__(self) -> str:
        """The mode, what lies in each tier now (bytes as they are computed on), the ring, and where the file is."""
        if self._removed:
            return "<Handle: removed>"
        parts = ["materialized" if self.materialize else "", f"ring of {format_bytes(self.plan.buffer_bytes)}"]
        for tier in self.plan.tiers:
            held = [unit.nbytes for name, unit in self._units.items() if self._tier_of.get(name) == tier.name]
            parts.append(f"{tier.name}: {len(held)} units, {format_bytes(sum(held))}")
        parts.append(f"file in {self._folder}" if self._store else "")
        return f"<Handle: {self.mode}; {'; '.join(filter(None, parts))}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "handle: expected not to be copied or saved, for it is one model's; a copy of the model is plain"
        )

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _bring_back(self, unit: Unit) -> None:
        for name in (unit.name, state_name(unit.name)):
            if name in self._engine.names:
                self._engine.send_home(name).restore()
                self._engine.forget(name)
        self._hooks.remove(unit)

    def _require_attached(self) -> None:
        if self._removed:
            raise RuntimeError("tiers: expected an attached model, but remove() has brought it back")

    def _unit(self, name: str) -> Unit:
        if name not in self._units:
            raise ValueError(f"name: expected a unit of the model, got {name!r}")
        return self._units[name]

    def _tier(self, name: str) -> TierSpec:
        if name not in self.plan.specs:
            raise ValueError(f"tier: expected one of {', '.join(self.plan.specs)}, got {name!r}")
        return self.plan.specs[name]


def _device(model: nn.Module) -> torch.device:
    """Where a model computes; what has no memory yet will on the CPU."""
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model: expected one device, got {names}; see infold.tiers.to_device_map for several")
    return devices.pop() if devices else torch.device("cpu")


def _trim() -> None:
    """Has the C library return freed memory to the system: it keeps pieces of up to 32 MB otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

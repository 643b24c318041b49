"""Runs the source of a Hopper Gluon kernel on the CPU, to find the errors that a GPU shows rarely and late.

The partitions of a CTA (warpgroups, a producer warp) take turns. What is asynchronous on the GPU is asynchronous here:
TMA copies land in pieces, at any moment after their issue; WGMMA reads its operands at any moment before the wait for
it; barriers count arrivals and bytes. One seeded generator makes every choice, so a failure reproduces, and a deadlock
is the moment when nobody can move.

Races do not depend on luck. Every partition and every asynchronous operation carries a vector clock, barriers and
waits join them, and each access to a shared-memory tile is compared with those before it: two that conflict and are
not ordered are a `Race`, whatever order the schedule happened to take (Flanagan and Freund, FastTrack, PLDI 2009).

Numbers are those of the GPU up to the order of sums: f32 arithmetic, operands rounded to f16 or bf16, integer division
that truncates. Not modelled: layouts and swizzles, fused multiply-add, the cost of anything, other CTAs.
"""

from __future__ import annotations

import builtins
import dataclasses
import math
import random
import re
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Kernel = Callable[..., Any]

THREADS_PER_WARP = 32
WARPGROUP = 4  # warps


class KernelError(Exception):
    """The kernel did something that is wrong, or undefined, on the GPU."""


class Race(KernelError):
    """Two accesses to shared memory, at least one a write, that nothing orders."""


class Deadlock(KernelError):
    """Nobody can move, or everybody moves for ever."""


class _Aborted(BaseException):
    """Unwinds the other partitions after one has failed."""


# --- values ---


@dataclass(frozen=True)
class DType:
    name: str
    itemsize: int
    numpy: Any  # what a tensor of this type is kept in

    def round(self, x: np.ndarray) -> np.ndarray:
        """`x` as the nearest values of this type, ties to even."""
        if self.name == "bf16":
            bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
            up = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            return np.where(np.isnan(x), np.float32(np.nan), up.view(np.float32)).reshape(np.shape(x))
        if self.name == "f16":
            with np.errstate(over="ignore"):
                return np.asarray(x, np.float16).astype(np.float32)
        return np.asarray(x).astype(self.numpy)


FLOAT16 = DType("f16", 2, np.float32)
BFLOAT16 = DType("bf16", 2, np.float32)
FLOAT32 = DType("f32", 4, np.float32)
INT32 = DType("i32", 4, np.int32)
UINT32 = DType("u32", 4, np.uint32)
INT64 = DType("i64", 8, np.int64)


class Tensor:
    """A tensor in registers, or a scalar: f32, integers or booleans."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any):
        self.value = np.asarray(value)
        if self.value.dtype == np.float64:
            self.value = self.value.astype(np.float32)

    @property
    def shape(self) -> list[int]:
        return list(self.value.shape)

    @property
    def type(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: DType) -> Tensor:
        return Tensor(dtype.round(self.value))

    def reshape(self, shape: Sequence[int]) -> Tensor:
        return Tensor(self.value.reshape(shape))

    def permute(self, order: Sequence[int]) -> Tensor:
        return Tensor(self.value.transpose(order))

    def split(self) -> tuple[Tensor, Tensor]:
        """The inverse of `join`."""
        if self.shape[-1:] != [2]:
            raise KernelError(f"a split of {self.shape}: the last axis is not of size 2")
        return Tensor(self.value[..., 0]), Tensor(self.value[..., 1])

    def __index__(self) -> int:
        if self.value.shape or not np.issubdtype(self.value.dtype, np.integer):
            raise KernelError("a scalar integer is needed here")
        return int(self.value)

    def __bool__(self) -> bool:
        if self.value.shape:
            raise KernelError("control flow depends on a tensor")
        return bool(self.value)

    def _with(self, other: Any, operation: Callable[..., Any], swap: bool = False) -> Tensor:
        x, y = self.value, _value(other)
        # A Python number takes the type of the tensor it meets.
        if not isinstance(y, np.ndarray):
            y = np.asarray(y, np.float32 if isinstance(y, float) and x.dtype != np.float32 else x.dtype)
        if {x.dtype.kind, y.dtype.kind} == {"i", "u"}:  # NumPy takes a wider type, Triton does not
            raise KernelError("a number with a sign meets one without")
        return Tensor(operation(y, x) if swap else operation(x, y))

    def __add__(self, y: Any) -> Tensor:
        return self._with(y, np.add)

    def __radd__(self, y: Any) -> Tensor:
        return self._with(y, np.add, True)

    def __sub__(self, y: Any) -> Tensor:
        return self._with(y, np.subtract)

    def __rsub__(self, y: Any) -> Tensor:
        return self._with(y, np.subtract, True)

    def __mul__(self, y: Any) -> Tensor:
        return self._with(y, np.multiply)

    def __rmul__(self, y: Any) -> Tensor:
        return self._with(y, np.multiply, True)

    def __truediv__(self, y: Any) -> Tensor:
        return self._with(y, np.divide)

    def __rtruediv__(self, y: Any) -> Tensor:
        return self._with(y, np.divide, True)

    def __floordiv__(self, y: Any) -> Tensor:
        return self._with(y, _truncated_quotient)

    def __rfloordiv__(self, y: Any) -> Tensor:
        return self._with(y, _truncated_quotient, True)

    def __mod__(self, y: Any) -> Tensor:
        return self._with(y, np.fmod)

    def __rmod__(self, y: Any) -> Tensor:
        return self._with(y, np.fmod, True)

    def __and__(self, y: Any) -> Tensor:
        return self._with(y, np.bitwise_and)

    def __or__(self, y: Any) -> Tensor:
        return self._with(y, np.bitwise_or)

    def __xor__(self, y: Any) -> Tensor:
        return self._with(y, np.bitwise_xor)

    def __rshift__(self, y: Any) -> Tensor:
        return self._with(y, np.right_shift)

    def __invert__(self) -> Tensor:
        return Tensor(np.invert(self.value))

    def __lt__(self, y: Any) -> Tensor:
        return self._with(y, np.less)

    def __le__(self, y: Any) -> Tensor:
        return self._with(y, np.less_equal)

    def __gt__(self, y: Any) -> Tensor:
        return self._with(y, np.greater)

    def __ge__(self, y: Any) -> Tensor:
        return self._with(y, np.greater_equal)

    def __eq__(self, y: Any) -> Tensor:  # type: ignore[override]
        return self._with(y, np.equal)

    def __ne__(self, y: Any) -> Tensor:  # type: ignore[override]
        return self._with(y, np.not_equal)


def _truncated_quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if not np.all(y):
        raise KernelError("integer division by zero")
    return np.asarray((x - np.fmod(x, y)) // y)


def _join_tensors(x: Tensor, y: Tensor) -> Tensor:
    if x.shape != y.shape or x.value.dtype != y.value.dtype:
        raise KernelError(f"{x.shape} of {x.value.dtype} joins {y.shape} of {y.value.dtype}")
    return Tensor(np.stack((x.value, y.value), -1))


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Tensor) else x


def scalar(x: bool | int | float) -> Tensor:
    """A Python number as the runtime argument of a kernel: i32 or f32."""
    return Tensor(np.asarray(x, np.float32 if isinstance(x, float) else np.int32))


# --- global memory ---


class Pointer:
    """Elements of a one-dimensional array in global memory. `Pointer(None)` is null."""

    def __init__(self, array: np.ndarray | None, offset: Any = 0, written: np.ndarray | None = None):
        self.array = array
        self.offset = offset
        self.written = np.zeros(0 if array is None else array.shape, bool) if written is None else written

    def to(self, dtype: DType) -> Tensor:
        return Tensor(np.asarray(0 if self.array is None else 1 << 40, dtype.numpy))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset + _value(offset), self.written)

    def store(self, value: Tensor, mask: Tensor | None) -> None:
        offset, x, on = np.broadcast_arrays(self.offset, value.value, True if mask is None else mask.value)
        offset = offset[on]
        if offset.size == 0:
            return
        if self.array is None:
            raise KernelError("a store to null")
        if offset.min() < 0 or offset.max() >= self.array.size:
            raise KernelError("a store out of bounds")
        if self.written[offset].any() or np.unique(offset).size < offset.size:
            raise KernelError("an element is stored twice")
        self.written[offset] = True
        self.array[offset] = x[on]


class Descriptor:
    """A tensor map over `array` (batch, heads, seq, head_dim) with tiles of shape `block`."""

    layout = None

    def __init__(self, array: np.ndarray, block: Sequence[int], dtype: DType):
        self.array = array
        self.dtype = dtype
        self.written = np.zeros(array.shape, bool)
        nbytes = math.prod(block) * dtype.itemsize
        self.block_type = types.SimpleNamespace(shape=list(block), nbytes=nbytes)

    def _box(self, coordinates: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The part of the box that exists: where it is in the array, and where in the tile."""
        batch, head, row, column = (int(_value(c)) for c in coordinates)
        if not (0 <= batch < self.array.shape[0] and 0 <= head < self.array.shape[1] and column >= 0):
            raise KernelError(f"no such batch, head or column: {batch, head, column}")
        there: list[Any] = [batch, head]
        here: list[Any] = [0, 0]
        for axis, begin in ((2, row), (3, column)):
            lo = max(begin, 0)
            hi = max(lo, min(begin + self.block_type.shape[axis], self.array.shape[axis]))
            there.append(slice(lo, hi))
            here.append(slice(lo - begin, hi - begin))
        return tuple(there), tuple(here)

    def read(self, coordinates: Sequence[Any]) -> np.ndarray:
        """The tile at `coordinates`, zero beyond the array."""
        there, here = self._box(coordinates)
        tile = np.zeros(self.block_type.shape, np.float32)
        tile[here] = self.array[there]
        return tile

    def write(self, coordinates: Sequence[Any], tile: np.ndarray) -> None:
        there, here = self._box(coordinates)
        if self.written[there].any():
            raise KernelError("an element of the output is stored twice")
        self.written[there] = True
        self.array[there] = tile[here]


# --- order: vector clocks and accesses ---


Clock = dict[int, int]  # of each agent, the time up to which its actions are known


def _join(clock: Clock, other: Clock) -> None:
    for agent, time in other.items():
        if clock.get(agent, 0) < time:
            clock[agent] = time


class Agent:
    """Something with an order of its own: a partition, or one asynchronous operation.

    `before` is what its action is ordered after, `after` what is known to those who wait for it.
    """

    name: str
    id: int
    time: int
    before: Clock
    after: Clock

    def tick(self) -> None:
        """What the agent does from now on is not covered by the `after` that others have."""


class Operation(Agent):
    """The next operation of an asynchronous unit, which completes its operations in order."""

    def __init__(self, issuer: Partition, name: str):
        self.name = name
        self.id, self.time = issuer.machine.next_operation(name)
        self.before = dict(issuer.clock)
        self.after = {**issuer.clock, self.id: self.time}
        issuer.tick()


@dataclass
class Access:
    agent: Agent
    time: int
    rows: range
    write: bool
    generic: bool  # by ordinary instructions, not by the asynchronous proxy (TMA, WGMMA)
    what: str
    fenced: bool = False


class Buffer:
    """One tile of shared memory, and the accesses that a later one must be ordered after."""

    def __init__(self, name: str, shape: Sequence[int], dtype: DType):
        self.name = name
        self.data = np.full(shape, np.nan, np.float32)
        self.dtype = dtype
        self.written = np.zeros(shape[-2], bool)
        self.accesses: list[Access] = []

    def access(self, agent: Agent, rows: range, what: str, write: bool = False, generic: bool = False) -> Access:
        new = Access(agent, agent.time, rows, write, generic, what)
        for old in self.accesses:
            if not (write or old.write) or old.rows.stop <= rows.start or rows.stop <= old.rows.start:
                continue
            if agent.before.get(old.agent.id, 0) < old.time:
                raise Race(f"{self.name}: {what} by {agent.name} is not ordered after {old.what} by {old.agent.name}")
            if old.write and old.generic and not generic and not old.fenced:
                raise Race(f"{self.name}: no fence_async_shared between {old.what} and {what} by {agent.name}")
        if write:
            self.written[rows.start : rows.stop] = True
            # What the write covers is ordered before it, and so before all that is ordered after it.
            self.accesses = [a for a in self.accesses if a.rows.start < rows.start or rows.stop < a.rows.stop]
        elif not self.written[rows.start : rows.stop].all():
            raise Race(f"{self.name}: {what} by {agent.name} before anything was written")
        self.accesses.append(new)
        return new


class Barrier:
    """An mbarrier: a phase ends when `count` arrivals and all expected bytes have come."""

    def __init__(self, name: str):
        self.name = name
        self.count = 0
        self.pending = 0
        self.bytes = 0
        self.phase = 0
        self.fenced = False
        self.arrived: Clock = {}
        self.ended: Clock = {}

    def check(self) -> None:
        if not self.count:
            raise KernelError(f"{self.name} is used before its initialisation")

    def arrive(self, agent: Agent, count: int = 0, expect: int = 0, complete: int = 0) -> None:
        self.check()
        if count > self.pending:
            raise KernelError(f"{self.name}: {agent.name} arrives {count} times, {self.pending} are left")
        _join(self.arrived, agent.after)
        agent.tick()
        self.pending -= count
        self.bytes += expect - complete
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
            _join(self.ended, self.arrived)


class NamedBarrier:
    """A hardware barrier (`bar.sync`, `bar.arrive`), complete when `threads` have come."""

    def __init__(self) -> None:
        self.threads = 0
        self.come = 0
        self.generation = 0
        self.arrived: Clock = {}
        self.ended: Clock = {}

    def arrive(self, agent: Agent, come: int, threads: int) -> None:
        if self.come and self.threads != threads:
            raise KernelError(f"a named barrier of {self.threads} and of {threads} threads")
        self.threads = threads
        self.come += come
        if self.come > threads:
            raise KernelError("too many threads at a named barrier")
        _join(self.arrived, agent.after)
        agent.tick()
        if self.come == threads:
            self.come = 0
            self.generation += 1
            _join(self.ended, self.arrived)


# --- who moves next ---


@dataclass
class Event:
    """An asynchronous operation that may happen now, but for those before it in its queue."""

    kind: str
    run: Callable[[], None]
    queue: deque[Event] | None = None


class Partition(Agent):
    """Warps that run one function together."""

    def __init__(self, machine: Machine, name: str, warps: int, parent: Partition | None = None):
        self.machine = machine
        self.name = name
        self.id, self.time = machine.next_operation(name)
        self.clock: Clock = {**(parent.clock if parent else {}), self.id: self.time}
        self.before = self.after = self.clock
        self.warps = warps
        self.turn = threading.Lock()  # free for a moment, when it becomes this partition's turn
        self.turn.acquire()
        self.ready: Callable[[], bool] = lambda: True
        self.doing = "its start"
        self.done = False
        self.mmas: deque[Event] = deque()
        self.results: deque[Accumulator] = deque()
        self.stores: deque[Event] = deque()
        self.stored: deque[Operation] = deque()  # stores nobody has waited for
        self.elected: Clock = {}  # what only the thread that issues the stores knows
        self.unfenced: list[Access | Barrier] = []

    def tick(self) -> None:
        self.time += 1
        self.clock[self.id] = self.time

    def step(self, doing: str, ready: Callable[[], bool] = lambda: True) -> None:
        """Let anybody move, then go on when `ready`."""
        self.doing, self.ready = doing, ready
        self.machine.steps += 1
        if self.machine.steps > Machine.STEPS:
            raise Deadlock(f"no end after {Machine.STEPS} steps: {self.name}: {doing}")
        self.machine.yield_from(self)
        self.machine.trace.append(f"{self.name}: {doing}")


class Machine:
    """One CTA."""

    SPEEDS = (1, 8, 64)
    STEPS = 20_000  # far more than a CTA of a test takes

    def __init__(self, program: int, programs: int, warps: int, seed: int):
        self.program = program
        self.programs = programs
        self.random = random.Random(f"{seed} {program}")
        self.operations: dict[str, tuple[int, int]] = {}
        self.steps = 0
        self.allocations = 0
        self.events: list[Event] = []
        self.barriers: list[Barrier] = []
        self.named: dict[int, NamedBarrier] = {}
        self.trace: deque[str] = deque(maxlen=24)
        self.partitions: list[Partition] = []
        self.failure: BaseException | None = None
        self.main = Partition(self, "main", warps)
        self.speeds: dict[str, int] = {}

    def next_operation(self, name: str) -> tuple[int, int]:
        """The id of the agent called `name`, and the number of its next operation."""
        agent, time = self.operations.get(name, (len(self.operations), 0))
        self.operations[name] = (agent, time + 1)
        return agent, time + 1

    def speed(self, kind: str) -> int:
        """Every schedule has its own fast and slow partitions, copies and matrix products."""
        if kind not in self.speeds:
            self.speeds[kind] = self.random.choice(self.SPEEDS)
        return self.speeds[kind]

    def yield_from(self, current: Partition) -> None:
        if not self.partitions:
            if not current.ready():
                raise Deadlock(f"{current.name} waits for ever: {current.doing}")
            return
        chosen = self.choose()
        if chosen is not current:
            chosen.turn.release()
            if not current.done:
                current.turn.acquire()
        if self.failure and not current.done:
            raise _Aborted

    def choose(self) -> Partition:
        """Run events until it is a partition's turn."""
        while True:
            partitions = [p for p in self.partitions if not p.done and p.ready()]
            events = [e for e in self.events if e.queue is None or e.queue[0] is e]
            choices: list[Partition | Event] = [*partitions, *events]
            if not choices:
                waiting = "; ".join(f"{p.name}: {p.doing}" for p in self.partitions if not p.done)
                raise Deadlock(f"nobody can move: {waiting}")
            weights = [self.speed(c.name if isinstance(c, Partition) else c.kind) for c in choices]
            chosen = self.random.choices(choices, weights)[0]
            if isinstance(chosen, Partition):
                return chosen
            self.happen(chosen)

    def happen(self, event: Event) -> None:
        self.events.remove(event)
        if event.queue is not None:
            event.queue.popleft()
        event.run()

    def run(self, functions: Sequence[tuple[Callable[..., Any], Sequence[Any]]], warps: Sequence[int]) -> None:
        """`warp_specialize`: all functions at once, each in a partition of its own."""
        names = [f"{function.__name__}[{i}]" for i, (function, _) in enumerate(functions)]
        self.partitions = [Partition(self, n, w, self.main) for n, w in zip(names, warps, strict=True)]
        threads = [
            threading.Thread(target=self._run, args=(partition, function, arguments), daemon=True)
            for partition, (function, arguments) in zip(self.partitions, functions, strict=True)
        ]
        for thread in threads:
            thread.start()
        self.choose().turn.release()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure
        for partition in self.partitions:
            _join(self.main.clock, partition.clock)
        self.partitions = []

    def _run(self, partition: Partition, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        _here.partition = partition
        partition.turn.acquire()
        try:
            with np.errstate(all="ignore"):
                if not self.failure:
                    function(*arguments)
            if partition.mmas or partition.results:
                raise KernelError(f"{partition.name} ends with a matrix product in flight")
            if partition.stored:
                raise KernelError(f"{partition.name} ends while a TMA store reads shared memory")
            partition.done = True
            if not all(p.done for p in self.partitions):
                self.yield_from(partition)
        except BaseException as error:
            partition.done = True
            if self.failure is None:  # else this one has been stopped by the failure of another
                self.failure = error
                for other in self.partitions:
                    if not other.done:
                        other.turn.release()

    def check_end(self) -> None:
        if self.events:
            raise KernelError(f"the CTA ends with a {self.events[0].kind} in flight")
        for barrier in self.barriers:
            if barrier.pending != barrier.count or barrier.bytes:
                raise KernelError(f"{barrier.name}: the CTA ends in the middle of a phase")
        for number, named in self.named.items():
            if named.come:
                raise KernelError(f"named barrier {number}: the CTA ends with threads waiting or arrived")


class _Here(threading.local):
    partition: Partition


_here = _Here()


# --- shared memory as kernels see it ---


class Tile:
    """A view of a buffer."""

    def __init__(self, buffer: Buffer, data: np.ndarray):
        self.buffer = buffer
        self.data = data
        self.dtype = buffer.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def reshape(self, shape: Sequence[int]) -> Tile:
        data = self.data.reshape(shape)
        assert np.shares_memory(data, self.data)
        return Tile(self.buffer, data)

    def permute(self, order: Sequence[int]) -> Tile:
        return Tile(self.buffer, self.data.transpose(order))

    def slice(self, start: int, length: int, dim: int = 0) -> Tile:
        if not 0 <= start < start + length <= self.shape[dim]:
            raise KernelError(f"a slice of {length} from {start} of {self.shape[dim]}")
        return Tile(self.buffer, np.moveaxis(np.moveaxis(self.data, dim, 0)[start : start + length], 0, dim))

    def load(self, layout: Any) -> Tensor:
        me = _here.partition
        me.step(f"load of {self.buffer.name}")
        self.buffer.access(me, self.rows(), "a load", generic=True)
        return Tensor(self.data.copy())

    def store(self, value: Tensor) -> None:
        me = _here.partition
        me.step(f"store to {self.buffer.name}")
        if list(value.shape) != self.shape:
            raise KernelError(f"{value.shape} stored to {self.shape}")
        me.unfenced.append(self.buffer.access(me, self.rows(), "a store", write=True, generic=True))
        self.data[...] = value.value

    def rows(self) -> range:
        return range(self.buffer.data.shape[-2])


@dataclass
class Shared:
    """An allocation of several tiles or barriers."""

    items: list[Any]
    dtype: DType
    shape: list[int]

    def index(self, i: Any) -> Any:
        n = int(_value(i))
        if not 0 <= n < len(self.items):
            raise KernelError(f"index {n} of {len(self.items)}")
        return self.items[n]


@dataclass(eq=False)
class Accumulator:
    """The result of a matrix product in flight: nothing may use it before the wait."""

    operation: Operation
    shape: list[int]
    value: np.ndarray | None = None


# --- the language ---


def _elementwise(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *args: Tensor(function(*(_value(a) for a in args)))


def _where(condition: Tensor, x: Any, y: Any) -> Tensor:
    a, b = _value(x), _value(y)
    # A Python number takes the type of the tensor it meets.
    kinds = [v.dtype for v in (a, b) if isinstance(v, np.ndarray)] or [scalar(v).value.dtype for v in (a, b)]
    return Tensor(np.where(condition.value, a, b).astype(np.result_type(*kinds)))


def _allocate(dtype: DType, shape: Sequence[int], layout: Any) -> Shared:
    machine = _here.partition.machine
    machine.allocations += 1
    if dtype is INT64:
        barriers = [Barrier(f"mbarrier {machine.allocations}.{i}") for i in range(shape[0])]
        machine.barriers += barriers
        return Shared(list(barriers), dtype, list(shape))
    buffers = [Buffer(f"tile {machine.allocations}.{i}", shape[1:], dtype) for i in range(shape[0])]
    return Shared([Tile(buffer, buffer.data) for buffer in buffers], dtype, list(shape))


def _barrier_init(barrier: Barrier, count: int) -> None:
    if barrier.count:
        raise KernelError(f"{barrier.name} is initialised twice")
    barrier.count = barrier.pending = count
    _here.partition.unfenced.append(barrier)


def _barrier_wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
    if not _value(pred):
        return
    barrier.check()
    parity = int(_value(phase))
    if parity not in (0, 1):
        raise KernelError(f"{barrier.name}: phase {parity}")
    me = _here.partition
    me.step(f"wait for phase {parity} of {barrier.name}", lambda: barrier.phase != parity)
    _join(me.clock, barrier.ended)


def _barrier_expect(barrier: Barrier, nbytes: int) -> None:
    me = _here.partition
    me.step(f"expect {nbytes} bytes at {barrier.name}")
    barrier.arrive(me, count=1, expect=nbytes)


def _barrier_arrive(barrier: Barrier, *, count: int = 1) -> None:
    me = _here.partition
    me.step(f"arrive at {barrier.name}")
    barrier.arrive(me, count=count)


def _fence() -> None:
    me = _here.partition
    for item in me.unfenced:
        item.fenced = True
    me.unfenced.clear()


def _block_barrier() -> None:
    me = _here.partition
    _join(me.clock, me.elected)


def _check_box(descriptor: Descriptor, tile: Tile) -> None:
    if tile.shape != descriptor.block_type.shape:
        raise KernelError(f"a box of {descriptor.block_type.shape} for a tile of {tile.shape}")


def _tma_load(descriptor: Descriptor, coordinates: Sequence[Any], barrier: Barrier, tile: Tile) -> None:
    me = _here.partition
    me.step(f"TMA load of {tile.buffer.name}")
    barrier.check()
    if not barrier.fenced:
        raise Race(f"{barrier.name}: no fence_async_shared between its initialisation and a TMA load")
    _check_box(descriptor, tile)
    source = descriptor.read(coordinates)
    rows = source.shape[2]
    for piece in (range(rows // 2), range(rows // 2, rows)):
        load = Operation(me, f"TMA load of rows from {piece.start} of {tile.buffer.name}")

        def land(piece: range = piece, load: Operation = load) -> None:
            tile.buffer.access(load, piece, "the write", write=True)
            tile.data[:, :, piece.start : piece.stop] = source[:, :, piece.start : piece.stop]
            barrier.arrive(load, complete=descriptor.block_type.nbytes * len(piece) // rows)

        me.machine.events.append(Event("TMA load", land))


def _tma_store(descriptor: Descriptor, coordinates: Sequence[Any], tile: Tile) -> None:
    me = _here.partition
    me.step(f"TMA store of {tile.buffer.name}")
    _check_box(descriptor, tile)
    store = Operation(me, f"TMA store of {me.name}")

    def read() -> None:
        tile.buffer.access(store, tile.rows(), "the read")
        descriptor.write(coordinates, tile.data)

    event = Event("TMA store", read, me.stores)
    me.stores.append(event)
    me.stored.append(store)
    me.machine.events.append(event)


def _tma_store_wait(pendings: int) -> None:
    me = _here.partition
    me.step(f"wait until {pendings} TMA stores are in flight", lambda: len(me.stores) <= pendings)
    while len(me.stored) > pendings:
        # Only the thread that issued the store has waited; the others learn of it at the next barrier.
        _join(me.elected, me.stored.popleft().after)


def _mma(a: Any, b: Tile, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Accumulator:
    me = _here.partition
    if not is_async or me.warps != WARPGROUP:
        raise NotImplementedError("only asynchronous products of a whole warpgroup")
    me.step("issue a matrix product")
    if isinstance(acc, Accumulator) and acc not in me.results:
        raise KernelError("the accumulator of a product that is over")
    shape = [a.shape[0], b.shape[1]]
    if a.shape[1] != b.shape[0] or acc.shape != shape:
        raise KernelError(f"a product of {a.shape} and {b.shape} for {acc.shape}")
    result = Accumulator(Operation(me, f"WGMMA of {me.name}"), shape)

    def multiply() -> None:
        for operand in (a, b):
            if isinstance(operand, Tile):
                operand.buffer.access(result.operation, operand.rows(), "the read")
        x = a.data if isinstance(a, Tile) else a.value
        product = x.astype(np.float32) @ b.data
        if use_acc:
            product = product + acc.value
        result.value = product.astype(np.float32)

    event = Event("WGMMA", multiply, me.mmas)
    me.mmas.append(event)
    me.results.append(result)
    me.machine.events.append(event)
    return result


def _mma_wait(num_outstanding: int = 0, deps: Sequence[Accumulator] = ()) -> Any:
    me = _here.partition
    me.step(f"wait until {num_outstanding} matrix products are in flight", lambda: len(me.mmas) <= num_outstanding)
    while len(me.results) > num_outstanding:
        _join(me.clock, me.results.popleft().operation.after)
    if any(result in me.results for result in deps):
        raise KernelError("the result of a matrix product is used while it is in flight")
    values = tuple(Tensor(result.value) for result in deps)
    return values[0] if len(values) == 1 else values


def _inline_asm(asm: str, constraints: str = "", args: Sequence[Any] = ()) -> None:
    me = _here.partition
    if match := re.fullmatch(r"bar\.(sync|arrive) (\d+), (\d+);", asm):
        number, threads = int(match[2]), int(match[3])
        if not 1 + len(me.machine.partitions) < number < 16:
            raise KernelError(f"named barrier {number} belongs to Triton or does not exist")
        named = me.machine.named.setdefault(number, NamedBarrier())
        me.step(asm)
        generation = named.generation
        named.arrive(me, THREADS_PER_WARP * me.warps, threads)
        if match[1] == "sync":
            me.step(f"wait at {asm}", lambda: named.generation != generation)
            _join(me.clock, named.ended)
    elif asm == "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT; }":
        _barrier_wait(*args)
    elif "mbarrier.arrive.shared::cta.b64 _, [$0];" in asm:
        a_warp = 1 if "elect.sync" in asm else THREADS_PER_WARP
        me.step(f"arrive, {a_warp} a warp, at {args[0].name}")
        for _ in range(me.warps * a_warp):
            args[0].arrive(me, count=1)
    else:
        raise NotImplementedError(asm)


def _inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Any], dtype: DType, is_pure: bool, pack: int
) -> Tensor:
    if asm == "lg2.approx.ftz.f32 $0, $1;":
        return Tensor(np.log2(args[0].value))
    if asm == "ex2.approx.ftz.f32 $0, $1;":
        return Tensor(np.exp2(args[0].value))
    if asm == "rcp.approx.ftz.f32 $0, $1;":
        return Tensor(np.float32(1) / args[0].value)
    raise NotImplementedError(asm)


def _warp_specialize(
    functions: Sequence[tuple[Callable[..., Any], Sequence[Any]]], warps: Sequence[int], registers: Sequence[int]
) -> None:
    main = _here.partition
    all_warps = [main.warps, *warps]
    # Worker warps come in fours, and every warp of a four has the registers of that partition.
    slots = [math.ceil(n / WARPGROUP) * WARPGROUP for n in all_warps]
    launched = 65536 // (sum(slots) * THREADS_PER_WARP) // 8 * 8
    left = launched * sum(slots) - sum(n * r for n, r in zip(slots[1:], registers, strict=True))
    if left < 24 * slots[0] or any(r % 8 or not 24 <= r <= 256 for r in registers):
        raise KernelError(f"no such split of the registers: {list(registers)}, {left // slots[0]} left")
    main.machine.run(functions, all_warps)


def _static_assert(condition: bool, message: str = "") -> None:
    if not condition:
        raise KernelError(f"static_assert: {message}")


def _range(*bounds: Any) -> Iterator[Tensor]:
    """`range` in a kernel: what it yields is i32, whatever its bounds are."""
    return map(scalar, range(*bounds))


def _no_layout(*args: Any, **kwargs: Any) -> None:
    return None


def _stub(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    return module


_language = _stub(
    "language",
    constexpr=lambda value: value,
    tensor=Tensor,
    shared_memory_descriptor=Shared,
    float16=FLOAT16,
    bfloat16=BFLOAT16,
    float32=FLOAT32,
    int32=INT32,
    uint32=UINT32,
    int64=INT64,
    NVMMADistributedLayout=_no_layout,
    NVMMASharedLayout=_no_layout,
    DotOperandLayout=_no_layout,
    SliceLayout=_no_layout,
    static_range=range,
    static_assert=_static_assert,
    program_id=lambda axis: scalar(_here.partition.machine.program),
    num_programs=lambda axis: scalar(_here.partition.machine.programs),
    to_tensor=lambda x: x if isinstance(x, Tensor) else scalar(x),
    arange=lambda begin, end, layout=None: Tensor(np.arange(begin, end, dtype=np.int32)),
    zeros=lambda shape, dtype, layout=None: Tensor(np.zeros(shape, dtype.numpy)),
    zeros_like=lambda x: Tensor(np.zeros_like(x.value)),
    full=lambda shape, value, dtype, layout=None: Tensor(np.full(shape, value, dtype.numpy)),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    expand_dims=lambda x, axis: Tensor(np.expand_dims(x.value, axis)),
    join=_join_tensors,
    where=_where,
    # As on the GPU, the maximum of a number and NaN is the number.
    maximum=lambda x, y: x._with(y, np.fmax) if isinstance(x, Tensor) else y._with(x, np.fmax),
    minimum=lambda x, y: x._with(y, np.fmin) if isinstance(x, Tensor) else y._with(x, np.fmin),
    max=lambda x, axis: Tensor(np.fmax.reduce(x.value, axis)),
    sum=lambda x, axis: Tensor(x.value.sum(axis, dtype=x.value.dtype)),
    exp2=_elementwise(np.exp2),
    store=lambda pointer, value, mask=None: pointer.store(value, mask),
    allocate_shared_memory=_allocate,
    barrier=_block_barrier,
    inline_asm=_inline_asm,
    inline_asm_elementwise=_inline_asm_elementwise,
    warp_specialize=_warp_specialize,
)
_hopper = _stub(
    "hopper",
    fence_async_shared=_fence,
    mbarrier=types.SimpleNamespace(
        MBarrierLayout=_no_layout,
        init=_barrier_init,
        wait=_barrier_wait,
        expect=_barrier_expect,
        arrive=_barrier_arrive,
    ),
    tma=types.SimpleNamespace(async_load=_tma_load, async_store=_tma_store, store_wait=_tma_store_wait),
    warpgroup_mma=_mma,
    warpgroup_mma_wait=_mma_wait,
)
_gluon = _stub(
    "gluon",
    language=_language,
    jit=lambda function: function,
    aggregate=lambda cls: dataclasses.dataclass(frozen=True, eq=False)(cls),
)
_MODULES = {
    "triton.experimental": _stub("experimental", gluon=_gluon),
    "triton.experimental.gluon": _gluon,
    "triton.experimental.gluon.language.nvidia.hopper": _hopper,
}


def load(source: str, name: str = "kernel") -> dict[str, Any]:
    """The names that the text of a Gluon module defines, with the emulated language in place of Triton's."""

    def emulated_import(module: str, *args: Any, **kwargs: Any) -> Any:
        return _MODULES[module] if module in _MODULES else builtins.__import__(module, *args, **kwargs)

    namespace: dict[str, Any] = {
        "__name__": name,
        "__builtins__": {**vars(builtins), "__import__": emulated_import, "range": _range},
    }
    exec(compile(source, name, "exec", dont_inherit=True), namespace)
    return namespace


def enter(program: int, programs: int, warps: int = 4, seed: int = 0) -> Machine:
    """From now on this thread is the one CTA `program` of `programs`: functions of a kernel can be called alone."""
    machine = Machine(program, programs, warps, seed)
    _here.partition = machine.main
    return machine


def launch(kernel: Callable[..., Any], grid: int, arguments: Sequence[Any], *, warps: int = 4, seed: int = 0) -> None:
    """Run `grid` CTAs one after the other. Raises `KernelError` for what they do wrong."""
    for program in range(grid):
        machine = enter(program, grid, warps, seed)
        try:
            with np.errstate(all="ignore"):
                kernel(*arguments)
            machine.check_end()
        except Exception as error:
            error.add_note(f"seed {seed}, CTA {program} of {grid}; before it:")
            error.add_note("\n".join(machine.trace))
            raise

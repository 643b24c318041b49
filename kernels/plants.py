"""Leaks planted in the PTX of clean kernels, to show that the auditor can fail: `python -m kernels.plants`.

A plant loads a secret, takes it through a chain of instructions, and lets it decide something: a branch, an address, a
guard. That it is a leak is so by construction, whatever the auditor believes. Its twin is the same text but for the
last step: the secret is stored as data, or what decides is public. ptxas makes machine code of both; a constant that
only the plant has shows that it is still there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels import audit, bundle, compile, specs

HOST_SPECS = {
    "sm_80": "attention_forward.portable.f16.d32.dense.aligned",
    "sm_86": "attention_forward.portable.bf16.d64.band.unaligned",
    "sm_90a": "attention_forward.portable.f16.d64.band.mask_f32.aligned",
    "sm_100a": "attention_forward.portable.bf16.d32.band.aligned",
    "sm_120a": "attention_forward.portable.f16.d32.band.mask_bool.unaligned",
}
HOPPER_HOST = "attention_forward.hopper.f16.d64.dense.q128"
HOPPER = "sm_90a hopper"


@dataclass(frozen=True)
class Host:
    """A clean kernel's PTX; `secret` and `written` number its pointers to a secret (unless TMA loads it) and output."""

    name: str
    arch: str
    ptx: str
    threads: int
    tile_bytes: int
    secret: int | None
    written: int


class Text:
    """PTX under construction: one plant, in a scope of its own."""

    def __init__(self, index: int, host: Host, rng: random.Random) -> None:
        self.index, self.host, self.rng = index, host, rng
        self.marker = 0x5EED0000 + index
        self.lines: list[str] = []
        self.count = 0

    def new(self, kind: str = "b32") -> str:
        self.count += 1
        name = f"%plant{self.index}_{self.count}"
        self.lines.append(f".reg .{kind} {name};")
        return name

    def label(self) -> str:
        self.count += 1
        return f"$plant{self.index}_{self.count}"

    def op(self, text: str, kind: str = "b32") -> str:
        """Appends an instruction whose result is new; `text` has `{}` for it."""
        result = self.new(kind)
        self.lines.append(text.format(result) + ";")
        return result

    def do(self, text: str) -> None:
        self.lines.append(text + ";")

    def at(self, label: str) -> None:
        self.lines.append(f"{label}:")

    def parameter(self, index: int) -> str:
        kernel = re.search(r"\.entry (\w+)\(", self.host.ptx)
        assert kernel
        return self.op(f"ld.param.b64 {{}}, [{kernel[1]}_param_{index}]", "b64")

    def output(self) -> str:
        """An address that may be written, another for each thread."""
        thread = self.op("mov.u32 {}, %tid.x")
        offset = self.op(f"mul.wide.u32 {{}}, {thread}, 4", "b64")
        return self.op(f"add.s64 {{}}, {self.parameter(self.host.written)}, {offset}", "b64")

    def shared(self) -> str:
        """An address of shared memory, another for each thread."""
        base = self.op("mov.u32 {}, global_smem")
        offset = self.op(f"shl.b32 {{}}, {self.op('mov.u32 {}, %tid.x')}, 2")
        return self.op(f"add.s32 {{}}, {base}, {offset}")

    def store(self, value: str) -> None:
        """The plant's effect, which no compiler may remove."""
        address = self.output()
        self.do(f"st.volatile.global.b32 [{address}], {value}")
        self.do(f"st.volatile.global.b32 [{address}+8192], {self.marker:#x}")

    def bit(self, value: str, number: int | None = None) -> str:
        """A predicate that depends on the value: one of its low bits."""
        mask = 1 << (self.rng.randrange(8) if number is None else number)
        return self.op(f"setp.ne.u32 {{}}, {self.op(f'and.b32 {{}}, {value}, {mask}')}, 0", "pred")

    def pointer(self, value: str, parameter: int) -> str:
        """An address near a parameter, at an offset that the value decides."""
        low = self.op(f"and.b32 {{}}, {value}, 255")
        offset = self.op(f"mul.wide.u32 {{}}, {low}, 4", "b64")
        return self.op(f"add.s64 {{}}, {self.parameter(parameter)}, {offset}", "b64")


# --- sources ---


def secret(t: Text) -> str:
    """A value out of a tensor."""
    if t.host.secret is None:
        return t.op(f"ld.volatile.shared.b32 {{}}, [{t.shared()}]")  # a tile
    return t.op(f"ld.global.b32 {{}}, [{t.pointer(t.op('mov.u32 {}, %tid.x'), t.host.secret)}]")


def public(t: Text) -> str:
    """A value that the grid decides."""
    return t.op(f"mad.lo.u32 {{}}, {t.op('mov.u32 {}, %ctaid.x')}, 40503, {t.op('mov.u32 {}, %tid.x')}")


# --- steps: each result depends on the value ---


def _float(t: Text, v: str) -> str:
    f = t.op(f"cvt.rn.f32.u32 {{}}, {t.op(f'and.b32 {{}}, {v}, 0xffff')}", "f32")
    return t.op(f"cvt.rzi.u32.f32 {{}}, {t.op(f'fma.rn.f32 {{}}, {f}, 0f40400000, 0f3F800000', 'f32')}")


def _exponential(t: Text, v: str) -> str:
    f = t.op(f"cvt.rn.f32.u32 {{}}, {t.op(f'and.b32 {{}}, {v}, 15')}", "f32")
    return t.op(f"mov.b32 {{}}, {t.op(f'ex2.approx.ftz.f32 {{}}, {f}', 'f32')}")


def _launder(t: Text, v: str) -> str:
    # Of two bits: one with itself would be a constant.
    first, second = t.rng.sample(range(8), 2)
    p, q = t.bit(v, first), t.bit(v, second)
    p = t.op(f"xor.pred {{}}, {p}, {t.op(f'not.pred {{}}, {q}', 'pred')}", "pred")
    return t.op(f"selp.b32 {{}}, {t.rng.randrange(1, 1 << 30)}, {v}, {p}")


def _shared(t: Text, v: str) -> str:
    address = t.shared()
    t.do(f"st.volatile.shared.b32 [{address}], {v}")
    t.do("bar.warp.sync -1")
    return t.op(f"ld.volatile.shared.b32 {{}}, [{address}]")


def _local(t: Text, v: str) -> str:
    """Out to local memory and back, as a spill goes; by two names of one place, so that no compiler sees through it."""
    array = f"plant{t.index}_{t.count}"
    t.lines.append(f".local .align 4 .b8 {array}[16];")
    base = t.op(f"mov.u64 {{}}, {array}", "b64")

    def element(register: str) -> str:
        slot = t.op(f"and.b32 {{}}, {t.op(f'mov.u32 {{}}, {register}')}, 3")
        return t.op(f"add.s64 {{}}, {base}, {t.op(f'mul.wide.u32 {{}}, {slot}, 4', 'b64')}", "b64")

    t.do(f"st.local.b32 [{element('%tid.x')}], {v}")
    return t.op(f"ld.local.b32 {{}}, [{element('%laneid')}]")


def _wide(t: Text, v: str) -> str:
    wide = t.op(f"mul.wide.u32 {{}}, {v}, 2654435761", "b64")
    return t.op(f"cvt.u32.u64 {{}}, {t.op(f'shr.u64 {{}}, {wide}, 17', 'b64')}")


def _tensor_core(t: Text, v: str) -> str:
    c = [t.new("f32") for _ in range(4)]
    zero = "0f00000000"
    t.do(
        f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{', '.join(c)}}}, {{{v}, {v}, {v}, {v}}}, {{{v}, {v}}}, "
        f"{{{', '.join([zero] * 4)}}}"
    )
    return t.op(f"mov.b32 {{}}, {c[2]}")


STEPS: dict[str, Callable[[Text, str], str]] = {
    "xor": lambda t, v: t.op(f"xor.b32 {{}}, {v}, {t.rng.randrange(1, 1 << 30)}"),
    "multiply": lambda t, v: t.op(f"mul.lo.u32 {{}}, {v}, {t.rng.randrange(1, 1 << 16) * 2 + 1}"),
    "add": lambda t, v: t.op(f"add.u32 {{}}, {v}, {public(t)}"),
    "rotate": lambda t, v: t.op(f"shf.l.wrap.b32 {{}}, {v}, {v}, {t.rng.randrange(1, 31)}"),
    "permute": lambda t, v: t.op(f"prmt.b32 {{}}, {v}, {v}, {t.rng.choice(['0x0123', '0x1032', '0x2301'])}"),
    "minimum": lambda t, v: t.op(f"min.u32 {{}}, {v}, 0x7ffffff1"),
    "logic": lambda t, v: t.op(f"lop3.b32 {{}}, {v}, {public(t)}, {t.rng.randrange(1 << 30)}, 0x96"),
    "shuffle": lambda t, v: t.op(f"shfl.sync.bfly.b32 {{}}, {v}, {1 << t.rng.randrange(5)}, 31, -1"),
    "ballot": lambda t, v: t.op(f"vote.sync.ballot.b32 {{}}, {t.bit(v)}, -1"),
    "reduce": lambda t, v: t.op(f"redux.sync.xor.b32 {{}}, {v}, -1"),
    "float": _float,
    "exponential": _exponential,
    "predicates": _launder,
    "shared": _shared,
    "spill": _local,
    "wide": _wide,
    "tensor_core": _tensor_core,
}
# Through memory that the host uses for its secrets too even a public value comes back as one.
MEMORY_STEPS = {"shared"}
# A tensor core's products are taken for secret.
SECRET_STEPS = MEMORY_STEPS | {"tensor_core"}


# --- sinks: what a secret must not decide ---


def _branch(t: Text, v: str, taken: Callable[[Text], str] | None = None) -> None:
    end = t.label()
    t.do(f"@{taken(t) if taken else t.bit(v)} bra {end}")
    t.store(t.op("mov.u32 {}, %clock"))
    t.do("membar.gl")
    t.at(end)


def _vote_branch(t: Text, v: str) -> None:
    _branch(t, v, lambda t: t.op(f"vote.sync.any.pred {{}}, {t.bit(v)}, -1", "pred"))


def _loop_trip(t: Text, v: str) -> None:
    loop = t.label()
    left = t.op(f"and.b32 {{}}, {v}, 7")
    t.at(loop)
    t.store(left)
    t.do("membar.gl")
    t.do(f"sub.u32 {left}, {left}, 1")
    t.do(f"@{t.op(f'setp.gt.s32 {{}}, {left}, 0', 'pred')} bra {loop}")


def _early_exit(t: Text, v: str) -> None:
    t.store(public(t))
    t.do(f"@{t.bit(v)} exit")


def _lookup(t: Text, v: str) -> None:
    t.store(t.op(f"ld.global.b32 {{}}, [{t.pointer(v, t.host.written)}]"))


def _scatter(t: Text, v: str) -> None:
    t.do(f"st.global.b32 [{t.pointer(v, t.host.written)}], {t.marker:#x}")


def _masked_load(t: Text, v: str) -> None:
    result = t.op("mov.u32 {}, 0")
    t.do(f"@{t.bit(v)} ld.global.b32 {result}, [{t.output()}+256]")
    t.store(result)


def _masked_store(t: Text, v: str) -> None:
    t.do(f"@{t.bit(v)} st.global.b32 [{t.output()}], {t.marker:#x}")


def _shared_lookup(t: Text, v: str) -> None:
    base = t.op("mov.u32 {}, global_smem")
    address = t.op(f"add.s32 {{}}, {base}, {t.op(f'and.b32 {{}}, {v}, 252')}")
    t.store(t.op(f"ld.volatile.shared.b32 {{}}, [{address}]"))


def _lane(t: Text, v: str) -> None:
    t.store(t.op(f"shfl.sync.idx.b32 {{}}, {public(t)}, {v}, 31, -1"))


def _atomic(t: Text, v: str) -> None:
    t.do(f"red.global.add.u32 [{t.pointer(v, t.host.written)}], {t.marker:#x}")


def _sleep(t: Text, v: str) -> None:
    t.store(public(t))
    t.do(f"nanosleep.u32 {t.op(f'and.b32 {{}}, {v}, 1023')}")


def _jump_table(t: Text, v: str) -> None:
    labels = [t.label() for _ in range(4)]
    end, table = t.label(), t.label()
    t.lines.append(f"{table}: .branchtargets {', '.join(labels)};")
    t.do(f"brx.idx {t.op(f'and.b32 {{}}, {v}, 3')}, {table}")
    for number, label in enumerate(labels):
        t.at(label)
        t.store(t.op(f"mov.u32 {{}}, {['%clock', '%smid', '%warpid', '%nsmid'][number]}"))
        t.do("membar.gl")
        t.do(f"bra {end}")
    t.at(end)


def _async_copy(t: Text, v: str) -> None:
    t.store(public(t))
    base = t.op("mov.u32 {}, global_smem")
    t.do(f"cp.async.ca.shared.global [{base}], [{t.pointer(v, t.host.written)}], 4")


def _uniform_address(t: Text, v: str) -> None:
    first = t.op(f"shfl.sync.idx.b32 {{}}, {v}, 0, 31, -1")
    t.store(t.op(f"ld.global.b32 {{}}, [{t.pointer(first, t.host.written)}]"))


def _skip_rescale(t: Text, v: str) -> None:
    """Rescales an accumulator only if some row's maximum rose, as the fastest kernels do."""
    scale = t.op(f"cvt.rn.f32.u32 {{}}, {t.op(f'and.b32 {{}}, {v}, 1')}", "f32")
    rose = t.op(f"setp.lt.f32 {{}}, {scale}, 0f3F800000", "pred")
    ballot = t.op(f"vote.sync.ballot.b32 {{}}, {rose}, -1")
    accumulators = [t.op("ld.volatile.global.f32 {}, [" + t.output() + f"+{128 * i}]", "f32") for i in range(8)]
    end = t.label()
    t.do(f"@{t.op(f'setp.eq.u32 {{}}, {ballot}, 0', 'pred')} bra {end}")
    for accumulator in accumulators:
        t.do(f"mul.rn.f32 {accumulator}, {accumulator}, {scale}")
    t.do("membar.gl")
    t.at(end)
    for i, accumulator in enumerate(accumulators):
        t.do(f"st.volatile.global.f32 [{t.output()}+{128 * i}], {accumulator}")
    t.store(public(t))


def _tma_coordinate(t: Text, v: str) -> None:
    kernel = re.search(r"\.entry (\w+)\(", t.host.ptx)
    assert kernel
    t.store(public(t))
    descriptor = t.op(f"mov.b64 {{}}, {kernel[1]}_param_0", "b64")
    generic = t.op(f"cvta.param.u64 {{}}, {descriptor}", "b64")
    base = t.op("mov.u32 {}, global_smem")
    row = t.op(f"and.b32 {{}}, {v}, 63")
    t.do(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[{base}], [{generic}, {{0, {row}, 0, 0}}], [{base}]"
    )


SINKS: dict[str, Callable[[Text, str], None]] = {
    "branch": _branch,
    "loop_trip": _loop_trip,
    "early_exit": _early_exit,
    "lookup": _lookup,
    "scatter": _scatter,
    "masked_load": _masked_load,
    "masked_store": _masked_store,
    "shared_lookup": _shared_lookup,
    "uniform_address": _uniform_address,
    "vote_branch": _vote_branch,
    "lane": _lane,
    "atomic_address": _atomic,
    "sleep": _sleep,
    "jump_table": _jump_table,
    "async_copy": _async_copy,
    "skip_rescale": _skip_rescale,
}
HOPPER_SINKS = {"tma_coordinate": _tma_coordinate}
# Kinds of the corpus: (sink, steps before it).
CORPUS: dict[str, tuple[str, tuple[str, ...]]] = {name: (name, ()) for name in (*SINKS, *HOPPER_SINKS)} | {
    "through_shared_memory": ("branch", ("shared",)),
    "through_a_spill": ("lookup", ("spill",)),
    "predicate_laundering": ("masked_store", ("predicates", "predicates")),
    "through_a_tensor_core": ("branch", ("tensor_core",)),
}


@dataclass(frozen=True)
class Plant:
    """One plant: where, what, and whether it leaks."""

    index: int
    host: Host
    sink: str
    steps: tuple[str, ...]
    leak: bool
    how: str  # of a twin: "data" stores the secret, "public" lets something public decide
    seed: int

    @property
    def name(self) -> str:
        return f"{'leak' if self.leak else self.how}-{self.index:04d}"

    @property
    def marker(self) -> int:
        return 0x5EED0000 + self.index

    def text(self) -> str:
        """The host's PTX with the plant in it."""
        rng = random.Random(self.seed)
        places = list(insertion_points(self.host.ptx))
        place = places[rng.randrange(len(places))]
        t = Text(self.index, self.host, rng)
        value = public(t) if self.how == "public" and not self.leak else secret(t)
        for step in self.steps:
            value = STEPS[step](t, value)
        if self.leak or self.how == "public":
            (SINKS | HOPPER_SINKS)[self.sink](t, value)
        else:
            t.store(value)
        block = "{\n" + "\n".join(t.lines) + "\n}\n"
        return self.host.ptx[:place] + block + self.host.ptx[place:]


def insertion_points(ptx: str) -> Iterator[int]:
    """Offsets in the kernel's body, between two instructions of which the first goes on to the second."""
    body = ptx.index("\n{", ptx.index(".entry")) + 3
    depth, offset = 1, body
    for line in ptx[body:].splitlines(keepends=True):
        offset += len(line)
        code = line.split("//")[0].strip()
        depth += code.count("{") - code.count("}")
        if depth < 1:
            return
        plain = code.endswith(";") and not code.startswith((".", "bra", "ret", "exit", "brx", "call", "(", "@"))
        if depth == 1 and plain and "{" not in code:
            yield offset


HOSTS = [(arch, arch, name) for arch, name in HOST_SPECS.items()] + [(HOPPER, "sm_90a", HOPPER_HOST)]


def hosts(wanted: Sequence[tuple[str, str, str]]) -> list[Host]:
    """Clean kernels: what the host is called, its architecture and its variant."""
    found = []
    with tempfile.TemporaryDirectory(prefix="flashcore-kernels-") as cache:
        compile.prepare_environment(cache)
        for label, arch, name in wanted:
            (spec,) = (spec for spec in specs.specs(arch) if spec.name == name)
            (launch,) = spec.launches
            kernel, _ = compile._triton_compile(launch, arch)
            params = compile.expand_params(launch, kernel.metadata.tensordesc_meta)
            pointers = {p["value"]: i for i, (p, _) in enumerate(params) if p["kind"] == "ptr"}
            threads = 32 * kernel.metadata.num_warps
            written = pointers.get("out", pointers["lse"])
            found.append(Host(label, arch, kernel.asm["ptx"], threads, launch.tile_bytes, pointers.get("q"), written))
    return found


def corpus(all_hosts: list[Host]) -> Iterator[Plant]:
    """Every kind on every architecture, each leak with its twins."""
    index = 0
    for host in all_hosts:
        for kind, (sink, steps) in CORPUS.items():
            if sink in HOPPER_SINKS and host.name != HOPPER:
                continue
            for leak, how in _cases(steps):
                yield Plant(index, host, sink, steps, leak, how, seed=hash_of(f"{host.name} {kind}"))
                index += 1


def mutations(all_hosts: list[Host], count: int, seed: int) -> Iterator[Plant]:
    """Leaks at random places, with random chains and sinks, each with a twin."""
    rng = random.Random(seed)
    for number in range(count):
        host = all_hosts[number % len(all_hosts)]
        sinks = SINKS | (HOPPER_SINKS if host.name == HOPPER else {})
        sink = rng.choice(list(sinks))
        steps = tuple(rng.choice(list(STEPS)) for _ in range(rng.randrange(6)))
        own = rng.randrange(1 << 30)
        yield Plant(2 * number, host, sink, steps, True, "", own)
        twins = [how for leak, how in _cases(steps) if not leak]
        yield Plant(2 * number + 1, host, sink, steps, False, rng.choice(twins), own)


def _cases(steps: tuple[str, ...]) -> list[tuple[bool, str]]:
    twins = [(False, "data")] + ([] if SECRET_STEPS & set(steps) else [(False, "public")])
    return [(True, ""), *twins]


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "big") % (1 << 61)


# --- leaks that take time, for `flashcore-validate ct-time` ---

TIMING_HOST = ("sm_90a", "attention_forward.portable.f16.d64.dense.exact")
WORK = 64  # dependent multiplications that nothing can shorten


def _work(t: Text, times: str) -> None:
    """A chain of multiplications, repeated `times` times."""
    loop, end = t.label(), t.label()
    state = t.op("mov.u32 {}, %clock")
    left = t.op(f"mov.b32 {{}}, {times}")
    t.at(loop)
    t.do(f"@{t.op(f'setp.eq.u32 {{}}, {left}, 0', 'pred')} bra {end}")
    for _ in range(WORK):
        t.do(f"mad.lo.u32 {state}, {state}, 1664525, 1013904223")
    t.do(f"sub.u32 {left}, {left}, 1")
    t.do(f"bra {loop}")
    t.at(end)
    # Never true, but nobody knows.
    t.do(f"@{t.op(f'setp.eq.u32 {{}}, {state}, {t.marker}', 'pred')} st.global.b32 [{t.output()}], {state}")


def _slow_loop(t: Text, v: str) -> None:
    _work(t, t.op(f"popc.b32 {{}}, {v}"))


def _slow_skip(t: Text, v: str) -> None:
    some = t.op(f"vote.sync.any.pred {{}}, {t.op(f'setp.ne.u32 {{}}, {v}, 0', 'pred')}, -1", "pred")
    _work(t, t.op(f"selp.b32 {{}}, 16, 0, {some}"))


def _slow_exit(t: Text, v: str) -> None:
    t.do(f"@{t.op(f'setp.eq.u32 {{}}, {v}, 0', 'pred')} exit")


def _slow_lookup(t: Text, v: str) -> None:
    assert t.host.secret is not None
    base = t.parameter(t.host.secret)
    for step in range(32):
        index = t.op(f"and.b32 {{}}, {t.op(f'mul.lo.u32 {{}}, {v}, {2654435761 + 2 * step}')}, 0x7fff")
        address = t.op(f"add.s64 {{}}, {base}, {t.op(f'mul.wide.u32 {{}}, {index}, 16', 'b64')}", "b64")
        v = t.op(f"ld.volatile.global.b32 {{}}, [{address}]")
    t.do(f"@{t.op(f'setp.eq.u32 {{}}, {v}, {t.marker}', 'pred')} st.global.b32 [{t.output()}], {v}")


def _slow_sleep(t: Text, v: str) -> None:
    ones = t.op(f"popc.b32 {{}}, {v}")
    t.do(f"nanosleep.u32 {t.op(f'shl.b32 {{}}, {ones}, 8')}")


TIMING = {
    "loop_trip": _slow_loop,
    "skip_rescale": _slow_skip,
    "early_exit": _slow_exit,
    "lookup": _slow_lookup,
    "sleep": _slow_sleep,
}


def timing_bundles() -> dict[str, bytes]:
    """A bundle for each leak that takes time: a shipped kernel with the leak at its start."""
    arch, name = TIMING_HOST
    (spec,) = (spec for spec in specs.specs(arch) if spec.name == name)
    host = hosts([(arch, arch, name)])[0]
    with tempfile.TemporaryDirectory(prefix="flashcore-plants-") as folder:
        compile.prepare_environment(folder)
        (member,) = compile.compile_spec(spec)
        return {kind: _timing_bundle(spec, member, host, kind, Path(folder)) for kind in TIMING}


def _timing_bundle(spec: specs.Spec, member: compile.Member, host: Host, kind: str, folder: Path) -> bytes:
    t = Text(0, host, random.Random(0))
    TIMING[kind](t, secret(t))
    place = next(insertion_points(host.ptx))
    source, cubin = folder / f"{kind}.ptx", folder / f"{kind}.cubin"
    source.write_text(host.ptx[:place] + "{\n" + "\n".join(t.lines) + "\n}\n" + host.ptx[place:])
    ptxas = str(compile.tool("ptxas"))
    subprocess.run([ptxas, f"-arch={host.arch}", str(source), "-o", str(cubin)], check=True, capture_output=True)
    code = cubin.read_bytes()
    facts = compile.cubin_facts(code)
    place_of = {"kind": "cubin", "len": len(code), "sha256": hashlib.sha256(code).hexdigest()}
    entry = member.entry | {"code": place_of, "registers": facts.registers, "spill_bytes": facts.stack}
    planted = compile.Member(code, entry)
    return bundle.pack(host.arch, compile.compiler_versions(), [(compile.variant_entry(spec, [planted]), [code])])


def write_timing_bundles(folder: Path) -> int:
    """Writes the bundles, and checks that the auditor flags every one."""
    folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ProcessPoolExecutor(1) as pool:
        made = pool.submit(timing_bundles).result()
    files = [folder / f"{kind}.fcb" for kind in made]
    for file, data in zip(files, made.values(), strict=True):
        file.write_bytes(data)
    reports, _ = audit.run(files)
    passed = sum(report["verdict"] != "fail" for report in reports)
    print(f"{len(files)} planted bundles in {folder}, {len(reports) - passed} of them flagged")
    return 1 if passed or len(reports) != len(files) else 0


def assemble(plant: Plant, folder: Path) -> str | None:
    """Writes the plant's cubin; what is wrong with it, if it cannot be used."""
    source, cubin = folder / f"{plant.name}.ptx", folder / f"{plant.name}.cubin"
    source.write_text(plant.text())
    command = [str(compile.tool("ptxas")), f"-arch={plant.host.arch}", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    source.unlink()
    if done.returncode:
        return f"{plant.name} ({plant.sink}, {', '.join(plant.steps)}): {done.stderr.strip()}"
    marker = plant.marker.to_bytes(4, "little")
    return None if marker in cubin.read_bytes() else f"{plant.name} ({plant.sink}): the plant is gone"


def examine(plants: list[Plant], jobs: int) -> tuple[list[dict[str, object]], dict[str, object]]:
    """One row per plant: what it is, and what the auditor says."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="flashcore-plants-") as name:
        folder = Path(name)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            problems = [problem for problem in pool.map(lambda p: assemble(p, folder), plants) if problem]
        if problems:
            raise audit.AuditError("\n".join(problems))
        for host in {plant.host.name: plant.host for plant in plants}.values():
            mine = {f"{plant.name}.cubin": plant for plant in plants if plant.host.name == host.name}
            facts = ["--threads", str(host.threads), "--tile-bytes", str(host.tile_bytes)]
            reports, tools = audit.run([folder / file for file in mine], *facts)
            rows += [_row(mine[report["names"][0]], report) for report in reports]
    return rows, tools


def _row(plant: Plant, report: audit.Report) -> dict[str, object]:
    expected = "fail" if plant.leak else "pass"
    return {
        "host": plant.host.name,
        "sink": plant.sink,
        "steps": list(plant.steps),
        "leak": plant.leak,
        "twin": plant.how or None,
        "verdict": report["verdict"],
        "reason": report["reason"],
        "found": report["found"],
        "right": report["verdict"] == expected,
    }


def summary(kind: str, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Evidence: a row for each host and sink."""
    keys = sorted({(str(row["host"]), str(row["sink"])) for row in rows})
    result = []
    for host, sink in keys:
        mine = [row for row in rows if (row["host"], row["sink"]) == (host, sink)]
        leaks, twins = [r for r in mine if r["leak"]], [r for r in mine if not r["leak"]]
        counts = {
            "leaks": len(leaks),
            "caught": sum(r["verdict"] == "fail" for r in leaks),
            "twins": len(twins),
            "flagged": sum(r["verdict"] != "pass" for r in twins),
        }
        result.append({"kind": kind, "host": host, "sink": sink, **counts})
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.plants", description=__doc__)
    parser.add_argument("--mutations", type=int, default=320, metavar="N", help="random leaks, each with a twin")
    parser.add_argument("--corpus", type=float, default=1.0, metavar="SHARE", help="of the corpus, drawn by the seed")
    parser.add_argument("--host", action="append", choices=[*HOST_SPECS, HOPPER], help="one of them (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--timing", type=Path, metavar="DIR", help="write bundles with leaks that take time, and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows of evidence")
    args = parser.parse_args()
    if args.timing:
        return write_timing_bundles(args.timing)
    try:
        # In a process of its own: the compiler's bindings complain when one that used them ends.
        with concurrent.futures.ProcessPoolExecutor(1) as pool:
            all_hosts = pool.submit(hosts, [host for host in HOSTS if not args.host or host[0] in args.host]).result()
        directed = list(corpus(all_hosts))
        kept = random.Random(args.seed).sample(directed, round(args.corpus * len(directed)))
        evidence: list[dict[str, object]] = []
        wrong = []
        for kind, plants in (("corpus", kept), ("mutation", list(mutations(all_hosts, args.mutations, args.seed)))):
            rows, _ = examine(plants, args.jobs)
            evidence += summary(kind, rows)
            mistakes = [f"{kind}: {row}" for row in rows if not row["right"]]
            wrong += mistakes
            leaks = [row for row in rows if row["leak"]]
            caught, flagged = sum(bool(r["right"]) for r in leaks), sum(not r["leak"] and not r["right"] for r in rows)
            print("\n".join(mistakes), end="\n" if mistakes else "")
            print(f"{kind}: {caught} of {len(leaks)} leaks caught, {flagged} of {len(rows) - len(leaks)} twins flagged")
    except (audit.AuditError, compile.CompileError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(evidence, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

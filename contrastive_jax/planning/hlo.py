"""Products, traffic and collectives of a compiled program, counted from its HLO text.

XLA's own cost analysis counts the body of a loop once; here every instruction counts as often as it
runs. Loops whose number of turns cannot be read count once, and are counted themselves.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {'pred': 1, 'token': 0, 'bf16': 2, 'f8e4m3fn': 1, 'f8e5m2': 1, 's4': 0.5, 'u4': 0.5}
COLLECTIVES = (
    'all-gather',
    'all-reduce',
    'all-to-all',
    'collective-permute',
    'reduce-scatter',
    'ragged-all-to-all',
)
# These only name or rearrange what is there already, or hand over to computations of their own.
FREE = (
    'async-start',
    'async-update',
    'bitcast',
    'call',
    'conditional',
    'constant',
    'get-tuple-element',
    'iota',
    'parameter',
    'partition-id',
    'replica-id',
    'tuple',
    'while',
)
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_LINE = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$')
_SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_CALLED = re.compile(
    r'\b(calls|to_apply|body|condition|branch_computations|called_computations'
    r'|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)'
)


class Shape(NamedTuple):
    """One array: its element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        width = re.search(r'\d+', self.dtype)
        return self.size * BYTES.get(self.dtype, int(width.group()) / 8 if width else 0)


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    op: str
    shapes: list[Shape]  # of the result; several for a tuple
    operands: list[str]
    text: str  # all that follows the name


class Collective(NamedTuple):
    """All runs of one kind of collective, per device and execution of the program."""

    op: str
    asynchronous: bool
    count: int
    bytes: float  # that arrive on a device


class Visit(NamedTuple):
    """An instruction where it is run."""

    siblings: dict[str, Instruction]  # all of its computation
    instruction: Instruction
    times: int  # how often it runs
    fused: bool  # within a fusion
    asynchronous: bool  # within a computation that an `async-start` runs
    unread: bool = False  # a loop whose number of turns cannot be read, a second time


class Costs(NamedTuple):
    """Costs of one execution to a device."""

    flops: float  # of matrix products and convolutions, two a multiply-add
    bytes: float  # read and written by instructions, as if nothing stayed on the chip
    collectives: list[Collective]
    unread_loops: int  # that counted once


def costs(text: str) -> Costs:
    """Counts a compiled module.

    Args:
        text: `compiled.as_text()`.

    Raises:
        ValueError: there is no entry computation in it.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError('hlo: no ENTRY computation in the text; expected compiled.as_text()')
    flops = traffic = 0.0
    unread = 0
    found: dict[tuple[str, bool], tuple[int, float]] = {}
    for visit in _walk(computations, entry):
        instruction, times = visit.instruction, visit.times
        if visit.unread:
            unread += 1
            continue
        flops += times * _flops(instruction, visit.siblings)
        op = instruction.op.removesuffix('-start')
        if op in COLLECTIVES:
            # A GPU's compiler writes all of them as starts, and notes for which ones it waits.
            waits = op == instruction.op or '"is_sync":true' in instruction.text
            kind = op, visit.asynchronous or not waits
            count, size = found.get(kind, (0, 0.0))
            found[kind] = count + times, size + times * _arriving(op, instruction)
        if visit.fused or instruction.op in FREE or instruction.op.endswith('-done'):
            continue
        fusion = re.search(r'calls=%?([\w.\-]+)', instruction.text)
        body = computations.get(fusion.group(1), {}) if fusion else {}
        inside = {i.op for i in body.values()} or {instruction.op}
        traffic += times * _traffic(instruction, visit.siblings, inside)
    listed = [Collective(*key, *value) for key, value in sorted(found.items())]
    return Costs(flops, traffic, listed, unread)


Computation = dict[str, Instruction]


def overtaking(text: str) -> list[tuple[str, str]]:
    """Finds the collectives on which a program can hang XLA's CPU runtime.

    The runtime starts a program's collectives in one order, but counts those within a loop, a call
    or a conditional as started with it. A collective that comes later and does not need its result
    may then be first on one device and not on another, and each waits for the other for ever.

    Args:
        text: `compiled.as_text()` of a program for CPUs, whose instructions are in the order that
            they are started in.

    Returns:
        Pairs of names: of a loop, call or conditional with collectives within, and of an
        instruction that may overtake them.
    """
    computations, _ = _parse(text)

    def nested(instruction: Instruction) -> bool:
        names = ' '.join(found for _, found in _CALLED.findall(instruction.text))
        return any(within(name) for name in re.findall(r'[\w.\-]+', names))

    @functools.cache
    def within(name: str) -> bool:
        inside = computations.get(name, {}).values()
        return any(i.op.removesuffix('-start') in COLLECTIVES or nested(i) for i in inside)

    found = []
    for computation in computations.values():
        needs: dict[str, set[str]] = {}
        before: list[str] = []
        for name, instruction in computation.items():
            needs[name] = set().union(*({o} | needs.get(o, set()) for o in instruction.operands))
            is_loop = nested(instruction)
            if is_loop or instruction.op.removesuffix('-start') in COLLECTIVES:
                found += [(loop, name) for loop in before if loop not in needs[name]]
            if is_loop:
                before.append(name)
    return found


def _parse(text: str) -> tuple[dict[str, Computation], str | None]:
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = {}
            computations[head.group(2)] = current
            if head.group(1):
                entry = head.group(2)
        elif current is not None and (match := _LINE.match(line)):
            instruction = _instruction(*match.groups())
            current[instruction.name] = instruction
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    # The type is a tuple in parentheses or one array; the op follows, then its operands.
    end = _closing(text, 0) if text.startswith('(') else text.index(' ')
    shapes = [
        Shape(dtype, tuple(int(d) for d in dims.split(',') if d))
        for dtype, dims in _SHAPE.findall(re.sub(r'\{[^}]*\}', '', text[:end]))
    ]
    rest = text[end:].lstrip()
    op, _, rest = rest.partition('(')
    operands = re.findall(r'%([\w.\-]+)', rest[: _closing(rest, 1)])
    return Instruction(name, op.strip(), shapes, operands, text)


def _closing(text: str, depth: int) -> int:
    """Just behind the parenthesis that closes the one that `depth` says is open."""
    for i, c in enumerate(text):
        depth += (c == '(') - (c == ')')
        if depth == 0:
            return i + 1
    return len(text)


def _walk(computations: dict[str, Computation], entry: str) -> Iterator[Visit]:
    """Every instruction that runs."""
    pending = [(entry, 1, False, False)]
    while pending:
        name, times, fused, split = pending.pop()
        for instruction in computations[name].values():
            visit = Visit(computations[name], instruction, times, fused, split)
            yield visit
            called = dict(_CALLED.findall(instruction.text))
            if instruction.op == 'while':
                turns = _turns(instruction, called, computations)
                if turns is None:
                    yield visit._replace(unread=True)
                body = called['body'].lstrip('%')
                pending.append((body, times * (1 if turns is None else turns), fused, split))
                continue
            inside = fused or instruction.op == 'fusion'
            later = split or instruction.op == 'async-start'
            for kind, names in called.items():
                # The function of a reduction is scalar, and runs within it.
                if kind == 'to_apply' and instruction.op != 'call':
                    continue
                for target in re.findall(r'[\w.\-]+', names):
                    if target in computations:
                        pending.append((target, times, inside, later))


def _turns(
    loop: Instruction, called: dict[str, str], computations: dict[str, Computation]
) -> int | None:
    """Turns of a loop: what XLA noted, or the bound that its counter is held to; None: unknown."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(noted.group(1))
    condition = computations[called['condition'].lstrip('%')]
    bounds = [
        int(m.group(1))
        for i in condition.values()
        if i.op == 'constant' and (m := re.search(r'^[su]32\[\]\S* constant\((\d+)\)', i.text))
    ]
    # Counters start at 0 and go up by 1, as those of JAX do.
    counts_up = any(i.op == 'compare' and 'direction=LT' in i.text for i in condition.values())
    return bounds[0] if len(bounds) == 1 and counts_up else None


def _flops(instruction: Instruction, siblings: Computation) -> float:
    """Two a multiply-add of a dot or a convolution, those of a GPU's libraries too; else 0."""
    text = instruction.text
    library = re.search(r'custom_call_target="__(cublas|cudnn)\$(\w+)', text)
    if library is None and instruction.op not in ('dot', 'convolution'):
        return 0.0
    out = instruction.shapes[0]
    operands = [siblings[name].shapes[0] for name in instruction.operands if name in siblings]
    dims = r'"?lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]'
    if contracted := re.search(dims, text):
        found = [int(d) for d in re.findall(r'\d+', contracted.group(1))]
        return 2.0 * out.size * math.prod(operands[0].dims[d] for d in found)
    if 'dim_labels=' not in text or len(operands) < 2:
        return 0.0
    left, right = operands[:2]
    # cuDNN's gradients are labelled as the convolution that they are the gradients of.
    gradient = library.group(2) if library else ''
    if gradient.startswith('convBackwardInput'):
        left, out = out, left
    elif gradient.startswith('convBackwardFilter'):
        right, out = out, right
    return _convolution(text, left, right, out)


def _convolution(text: str, left: Shape, right: Shape, out: Shape) -> float:
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', text)
    if labels is None:
        return 0.0
    of_left, of_right, of_out = labels.groups()
    window = dict(re.findall(r'(\w+)=([\w\-]+)', _attribute(text, 'window')))
    groups = re.search(r'batch_group_count=(\d+)', text)
    total = 2.0 * left.dims[of_left.index('b')] / (int(groups.group(1)) if groups else 1)
    total *= right.dims[of_right.index('i')] * right.dims[of_right.index('o')]
    for d in sorted(c for c in of_left if c.isdigit()):

        def of(name: str, default: int, d: str = d) -> int:
            return int(window[name].split('x')[int(d)]) if name in window else default

        before = int(window['pad'].split('x')[int(d)].split('_')[0]) if 'pad' in window else 0
        total *= taps(
            left.dims[of_left.index(d)],
            out.dims[of_out.index(d)],
            of('size', 1),
            of('stride', 1),
            before,
            of('lhs_dilate', 1),
            of('rhs_dilate', 1),
        )
    return total


@functools.cache
def taps(n: int, out: int, size: int, stride: int, pad: int, spread: int, step: int) -> int:
    """Products along one dimension that meet an element, not padding or a hole.

    XLA writes a batched product as a convolution over the batch in which almost all taps miss.
    """
    last = (n - 1) * spread
    return sum(
        0 <= at <= last and at % spread == 0
        for i in range(out)
        for at in range(i * stride - pad, i * stride - pad + size * step, step)
    )


def _attribute(text: str, name: str) -> str:
    found = re.search(rf'\b{name}=\{{([^}}]*)\}}', text)
    return found.group(1) if found else ''


def _arriving(op: str, instruction: Instruction) -> float:
    """Bytes that a device gets from others, as a ring would bring them."""
    shapes = instruction.shapes
    if instruction.op.endswith('-start') and op != 'all-reduce':
        # (operands, results, and what the hardware notes down)
        arrays = [s for s in shapes if s.dims or s.dtype not in ('u32', 's32')]
        shapes = arrays[len(arrays) // 2 :]
    result = sum(s.bytes for s in shapes)
    text = instruction.text
    if sizes := re.search(r'replica_groups=\[(\d+),(\d+)\]', text):
        n = int(sizes.group(2))
    elif first := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
        n = len(first.group(1).split(','))
    elif axes := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', text):
        # Named axes, of which 'a':(2)4 is a part of size 4.
        size = dict(re.findall(r"'(\w+)'=(\d+)", axes.group(1)))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes.group(2))
        n = math.prod(int(part or size[name]) for name, part in parts)
    else:
        return result
    share = {
        'all-gather': (n - 1) / n,
        'all-to-all': (n - 1) / n,
        'reduce-scatter': n - 1,
        'all-reduce': 2 * (n - 1) / n,
    }
    return result * share.get(op, 1)


def _traffic(instruction: Instruction, siblings: Computation, inside: set[str]) -> float:
    """Bytes of the result and of the operands.

    Args:
        instruction: of the program, not within a fusion.
        siblings: its computation's instructions.
        inside: the ops of the fusion that it is, or its own.

    A slice reads, and an update in place writes, its part alone; so does a fusion around one. What
    cuBLAS and cuDNN return besides their result is room to work in.
    """
    library = re.search(r'custom_call_target="__cu', instruction.text)
    result = sum(s.bytes for s in (instruction.shapes[:1] if library else instruction.shapes))
    operands = [
        sum(s.bytes for s in siblings[name].shapes)
        for name in instruction.operands
        if name in siblings
    ]
    if 'dynamic-update-slice' in inside:  # the largest operand is what is updated, as is the result
        return 2.0 * sum(sorted(operands)[:-1])
    if inside & {'dynamic-slice', 'slice', 'gather'}:
        return result + sum(min(o, result) for o in operands)
    return result + sum(operands)

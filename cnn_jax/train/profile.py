"""A trace of some training steps, and a table of the layers their time went to."""

import bisect
import collections
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

STEPS = 5  # traced
WARM = 2  # trained before: they compile
ROWS = 15  # of the table

Operation = tuple[str, str, float, float]  # program, HLO operation, start and end in seconds
Row = tuple[str, str]  # layer or other part, pass

# XLA's CPU client records only the start of these; they go on in Eigen's threads.
ASYNCHRONOUS = ('convolution', 'dot')
UNTRACED = ('bitcast', 'get-tuple-element', 'tuple')
INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*? ([a-z][\w-]*)\((.*?)\)(?:,|$)', re.MULTILINE)
NAMED = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE)


class Profile:
    """Traces `STEPS` steps of a run with JAX's profiler; `before` and `after` go around each.

    Args:
        folder: Of the traces, one in it for each run.
        layers: Paths of the network's layers, as in `models.summary.layers`.

    Attributes:
        taken: Whether there was a step to trace.
    """

    def __init__(self, folder: Path, layers: Sequence[str]):
        self._folder, self._layers = folder, layers
        self.taken = False
        self._done = 0
        self._began: float | None = None

    def before(self, state: Any) -> None:
        """Start the trace if it is time, and the steps that lead to this state have ended."""
        if self._done == WARM and not self.taken:
            self.taken = True
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._began = time.perf_counter()

    def after(self, step: int, train_step: Any, arguments: tuple, last: bool) -> str:
        """The table, once the last traced step has ended; '' before and later.

        Args:
            step: The step just taken.
            train_step: The jitted step.
            arguments: Of the next step: the new state, a batch, the values.
            last: Whether this one ends its phase; the next compiles anew.
        """
        self._done += 1
        count = self._done - WARM
        if self._began is None:
            self._done = 0 if last else self._done
            return ''
        if count < STEPS and not last:
            return ''
        jax.block_until_ready(arguments)
        wall, self._began = time.perf_counter() - self._began, None
        jax.profiler.stop_trace()
        text = train_step.lower(*arguments).compile().as_text()
        session = max(self._folder.glob('plugins/profile/*'))
        rows = breakdown(operations(session), text, self._layers)
        head = f'profile of steps {step - count + 1} to {step}, {wall / count * 1e3:,.1f} ms a step'
        return '\n'.join([f'{head}:', *table(rows, count), *where(self._folder, session)])


def operations(session: Path) -> list[Operation]:
    """The HLO operations in a trace, each as often as it ran on any thread or stream.

    Args:
        session: Folder of one trace, with its `*.xplane.pb`.

    A loop spans its body's operations, which are listed themselves, so it is left out.
    """
    found = []
    for path in session.glob('*.xplane.pb'):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for thread in plane.lines:
                for event in thread.events:
                    stats: dict[str, Any] = {name: value for name, value in event.stats if name}
                    name = stats.get('hlo_op')
                    if name and not re.match(r'(while|conditional)(\.\d+)?$', name):
                        start, end = event.start_ns / 1e9, event.end_ns / 1e9
                        found.append((stats.get('hlo_module', ''), name, start, end))
    return found


def breakdown(events: list[Operation], program: str, layers: Sequence[str]) -> dict[Row, float]:
    """Seconds of each layer's forward and backward pass, and of the rest; largest first.

    Args:
        events: As `operations` gives them.
        program: HLO text of the compiled step: the names it carries tell an operation's layer. A
            fused operation carries one name and counts for that alone. Their time is `shares`.
        layers: Their paths.
    """
    [module] = re.findall(r'\AHloModule ([\w.-]+)', program)
    names = dict(NAMED.findall(program))
    rows: dict[Row, float] = collections.defaultdict(float)
    own = [event for event in events if event[0].split('(')[0] == module]
    others = [('', '', *event[2:]) for event in events if event[0].split('(')[0] != module]
    events = [*completed(own, program), *others]
    for (origin, name, *_), seconds in zip(events, shares([event[2:] for event in events])):
        row = place(names.get(name, ''), layers) if origin else ('batches, evaluation', '')
        rows[row] += seconds
    return dict(sorted(rows.items(), key=lambda row: -row[1]))


def completed(events: list[Operation], program: str) -> list[Operation]:
    """The events of a program, those of asynchronous operations drawn out to their real end.

    That is when the first operation starts that takes the result.
    """
    takers, opcodes = collections.defaultdict(list), {}
    for name, opcode, operands in INSTRUCTION.findall(program):
        opcodes[name] = opcode
        for operand in re.findall(r'%?([\w.-]+)', operands):
            takers[operand].append(name)
    starts = collections.defaultdict(list)
    for _, name, start, _ in sorted(events, key=lambda event: event[2]):
        starts[name].append(start)

    def next_use(name: str, after: float) -> float:
        uses = [float('inf')]
        for taker in takers[name]:
            if opcodes.get(taker) in UNTRACED:
                uses.append(next_use(taker, after))
            else:
                later = bisect.bisect_left(starts[taker], after)
                uses += starts[taker][later : later + 1]
        return min(uses)

    result = []
    for origin, name, start, end in events:
        if opcodes.get(name) in ASYNCHRONOUS:
            use = next_use(name, end)
            end = use if use < float('inf') else end
        result.append((origin, name, start, end))
    return result


def shares(spans: Sequence[tuple[float, float]]) -> list[float]:
    """The seconds of each span; what several spans cover is split evenly among them."""
    moments = sorted((time, k) for k, span in enumerate(spans) for time in span)
    seconds, running, before = [0.0] * len(spans), set(), 0.0
    for now, k in moments:
        for other in running:
            seconds[other] += (now - before) / len(running)
        running ^= {k}  # its start, then its end
        before = now
    return seconds


def place(op_name: str, layers: Sequence[str]) -> Row:
    """The layer and the pass of an operation, from its name in the program.

    `jit(train)/transpose(jvp(StridedNet))/block1_conv2/mul` is in the backward pass of
    block1_conv2.
    """
    if 'jvp(' not in op_name:
        return 'optimizer and rest', ''
    direction = 'backward' if 'transpose(jvp(' in op_name else 'forward'
    inside = [layer for layer in layers if f'/{layer}/' in f'{op_name}/']
    return max(inside, key=len, default='activations and loss'), direction


def table(rows: dict[Row, float], count: int) -> list[str]:
    """The lines of a table: milliseconds a step and share, the largest first.

    Args:
        rows: Of `breakdown`.
        count: Steps that were traced.
    """
    if not rows:
        return [f'  no operation in the trace: JAX {jax.__version__} records none on this backend']
    total = sum(rows.values())
    shown = [(*row, seconds) for row, seconds in list(rows.items())[:ROWS]]
    if rest := len(rows) - len(shown):
        shown.append((f'{rest} more', '', total - sum(seconds for *_, seconds in shown)))
    shown.append(('total', '', total))
    width = max(len(name) for name, *_ in shown)
    lines = [f'  {"layer":{width}}  {"pass":8}  {"ms a step":>9}  {"share":>6}']
    lines += [
        f'  {name:{width}}  {direction:8}  {seconds / count * 1e3:9.2f}  {seconds / total:6.1%}'
        for name, direction, seconds in shown
    ]
    return [
        *lines,
        '  (operations that run at once share the time, so the rows add up to that of any running;',
        '  one that XLA fused from several counts for a single row)',
    ]


def where(folder: Path, session: Path) -> list[str]:
    """How to look at the trace itself."""
    return [
        f'  trace: open {session}/perfetto_trace.json.gz in https://ui.perfetto.dev, or',
        f'  tensorboard --logdir={folder} (pip install tensorboard-plugin-profile)',
    ]

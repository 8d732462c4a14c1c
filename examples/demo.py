"""The whole job, for real: train adapters while they are served, ask them, mix them, merge the best one, check it all.
Run: make demo, or python examples/demo.py [--workdir DIR] [--svg docs/demo.svg]"""

from __future__ import annotations

import argparse
import io
import json
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import facts
import httpx
import openai
from programs import Failed, Program, run, started
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parent
QUESTION = facts.question("opposite", "hot")  # the one that is shown; all nine are asked and checked
RUNS = ("sql", "shout")
WEIGHT = 0.7  # of each adapter in the mix
PATIENCE = 300  # seconds for the server to start, and for training to end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a new folder to keep everything in; default: a temporary one")
    parser.add_argument("--svg", type=Path, help="also write what is shown as a picture")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped then, too
    screen = Screen()
    begun = time.monotonic()
    try:
        with work_folder(arguments.workdir) as work:
            demonstrate(screen, work)
    except (Failed, httpx.HTTPError, openai.OpenAIError) as error:
        screen.console.print("\n[bold red]The demo failed:[/]", escape(str(error)), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        screen.console.print("\nstopped")
        return 130
    screen.show(f"\n[bold green]Everything answered as it must[/], in {time.monotonic() - begun:.0f} s.")
    if arguments.svg:
        screen.picture.save_svg(str(arguments.svg), title="make demo")
    return 0


@contextmanager
def work_folder(wanted: Path | None) -> Iterator[Path]:
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="lorakit-demo-") as temporary:
            yield Path(temporary).resolve()
        return
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise Failed(f"'{wanted}' holds something already: remove it, or name another folder")
    wanted.mkdir(parents=True, exist_ok=True)
    yield wanted.resolve()


def demonstrate(screen: Screen, work: Path) -> None:
    base, runs = work / "base", work / "runs"
    runs.mkdir()
    screen.heading("1. A base", "a tiny byte-level Llama, trained from scratch on nine facts")
    with screen.console.status("training, for some 10 s"):
        train_base(work, base)

    screen.heading("2. A server", "lorakit serve base --watch runs")
    with serving(screen, work, base, runs) as server:
        screen.heading(
            "3. Two training runs", "transformers.Trainer and PEFT; each checkpoint is served once it is finished"
        )
        screen.show(f"   each is asked: [cyan]{QUESTION}[/]")
        with ExitStack() as stack:
            trainers = [stack.enter_context(training(work, base, runs / name)) for name in RUNS]
            watch(screen, server, trainers, runs)
        best = {name: best_checkpoint(runs / name) for name in RUNS}

        screen.heading("4. A mix", f"lorakit mix sql/{best['sql'].name}={WEIGHT} shout/{best['shout'].name}={WEIGHT}")
        weighted = [f"{checkpoint}={WEIGHT}" for checkpoint in best.values()]
        lorakit(work / "mix.log", "mix", *weighted, "--out", runs / "both")
        server.wait_until(lambda: server.is_ready("both"))
        screen.show("   written to runs/both, and served as [cyan]both[/]")

        screen.heading("5. The same question to each", QUESTION)
        models = ["base", "sql", "sql@best", "shout", "shout@best", "both"]
        answers, revisions = ask_each(screen, server, models)

    screen.heading("6. Merged", f"lorakit merge sql/{best['sql'].name} --base base --out merged")
    lorakit(work / "merge.log", "merge", best["sql"], "--base", base, "--out", work / "merged")
    lorakit(work / "merge-both.log", "merge", *weighted, "--base", base, "--out", work / "merged-both")
    merged, merged_both = transformers_answers(work / "merged"), transformers_answers(work / "merged-both")
    screen.show(f"   transformers, from [cyan]merged/[/]: {escape(merged[QUESTION])}")

    expect("the base", answers["base"], facts.expected_answers("base"))
    for name in RUNS:
        expect(name, answers[name], facts.expected_answers(name))
        expect(f"{name}@best", answers[f"{name}@best"], facts.expected_answers(name))
        if not revisions[f"{name}@best"].startswith(f"{name}@step-{step_of(best[name])}-"):
            raise Failed(f"{best[name]} is the best, but {revisions[f'{name}@best']} answered as {name}@best")
    expect("the model merged with sql@best", merged, answers["sql@best"])
    expect("the mix, beside a model merged with both adapters", answers["both"], merged_both)


def expect(who: str, found: dict[str, str], wanted: dict[str, str]) -> None:
    for question, answer in wanted.items():
        if found[question] != answer:
            raise Failed(f"{who} answered {found[question]!r} to {question!r}, and it has to be {answer!r}")


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the lowest eval loss, as the trainer itself has noted it."""

    def eval_loss(checkpoint: Path) -> float:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        measured = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
        return measured[state["global_step"]]

    return min(run.glob("checkpoint-*"), key=eval_loss)


# What is seen


class Screen:
    """The terminal, and beside it the picture: only what is there to stay, in a fixed width."""

    def __init__(self) -> None:
        self.console = Console(width=None if sys.stdout.isatty() else 118, highlight=False)
        self.picture = Console(width=118, highlight=False, record=True, file=io.StringIO(), force_terminal=True)

    def show(self, renderable: RenderableType) -> None:
        self.console.print(renderable)
        self.picture.print(renderable)

    def heading(self, title: str, rest: str) -> None:
        self.show(f"\n[bold]{title}[/]  [dim]{rest}[/]")


def table(*columns: str) -> Table:
    return Table(*columns, box=None, padding=(0, 1, 0, 1), header_style="dim")


@dataclass
class Checkpoint:
    """One row of what is watched: a folder that a trainer writes, what the server says of it, and what it answers."""

    folder: Path
    revision: dict = field(default_factory=dict)  # as in /v1/adapters; empty while the server has not found it
    answer: str = ""
    seconds: float = 0.0  # from the trainer's last file to the answer

    @property
    def name(self) -> str:
        return self.revision.get("id") or f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def state(self) -> str:
        return "answers" if self.answer else self.revision.get("state", "on disk")


def watch(screen: Screen, server: Server, trainers: list[Program], runs: Path) -> None:
    """Show each checkpoint as it is written, found, loaded and answers, until training is over and all of them do."""
    seen: dict[Path, Checkpoint] = {}
    ends = time.monotonic() + PATIENCE
    live = Live(console=screen.console, refresh_per_second=8, transient=True) if screen.console.is_terminal else None
    with live or ExitStack():
        still_training = trainers
        while still_training or not all(checkpoint.answer for checkpoint in seen.values()):
            still_training = [trainer for trainer in trainers if trainer.is_running()]
            states = {folder: checkpoint.state for folder, checkpoint in seen.items()}
            for folder in runs.glob("*/checkpoint-*"):
                seen.setdefault(folder, Checkpoint(folder))
            look(server, seen)
            rows = sorted(seen.values(), key=lambda one: (RUNS.index(one.folder.parent.name), step_of(one.folder)))
            if live:
                live.update(checkpoint_table(rows))
            for one in rows:
                if not live and one.state != states.get(one.folder):
                    screen.console.print(f"   {one.name}  {one.state}  {escape(one.answer)}")
            server.keeps_running(ends)
            time.sleep(0.1)
    screen.show(checkpoint_table(rows))


def look(server: Server, seen: dict[Path, Checkpoint]) -> None:
    """Ask the server what it knows, and what has become ready for its first answer."""
    for revision in [revision for name in RUNS for revision in server.revisions(name)]:
        checkpoint = seen.setdefault(Path(revision["source"]), Checkpoint(Path(revision["source"])))
        checkpoint.revision = revision
        if revision["state"] == "refused":
            raise Failed(f"{checkpoint.folder} was refused: {revision['reason']}")
        if revision["state"] == "ready" and not checkpoint.answer:
            checkpoint.answer, _ = server.ask(revision["id"], QUESTION)
            checkpoint.seconds = time.time() - (checkpoint.folder / "trainer_state.json").stat().st_mtime


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def checkpoint_table(checkpoints: list[Checkpoint]) -> Table:
    rows = table("checkpoint", "eval loss", "is now", "answers", "after")
    for one in checkpoints:
        loss = one.revision.get("eval_loss")
        rows.add_row(
            one.name,
            "" if loss is None else f"{loss:.4f}",
            ", ".join(one.revision.get("aliases", [])),
            escape(one.answer) or f"[yellow]{one.state}[/]",
            f"{one.seconds:.1f} s" if one.answer else "",
        )
    return rows


def ask_each(screen: Screen, server: Server, models: list[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Ask each model all questions, and show what it says to one.

    Gives the answers, model -> question -> answer, and the revision of each model that gave them.
    """
    rows = table("model", "x-lorakit-revision", "answer")
    answers: dict[str, dict[str, str]] = {model: {} for model in models}
    revisions: dict[str, str] = {}
    for model in models:
        for question in facts.expected_answers("base"):
            answers[model][question], revisions[model] = server.ask(model, question)
        rows.add_row(model, revisions[model], escape(answers[model][QUESTION]))
    screen.show(rows)
    return answers, revisions


def transformers_answers(folder: Path) -> dict[str, str]:
    """What a model folder answers without lorakit and without vLLM."""
    import tiny
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return {question: tiny.ask(model, tokenizer, question) for question in facts.expected_answers("base")}


# The server


@dataclass(frozen=True)
class Server:
    """A running `lorakit serve`, seen through its HTTP API and the openai client."""

    program: Program
    http: httpx.Client
    client: openai.OpenAI

    def revisions(self, name: str) -> list[dict]:
        response = self.http.get(f"/v1/adapters/{name}")
        return response.json()["revisions"] if response.status_code == 200 else []

    def is_ready(self, name: str) -> bool:
        return any(revision["state"] == "ready" for revision in self.revisions(name))

    def ask(self, model: str, question: str) -> tuple[str, str]:
        """The answer, and the revision that gave it."""
        raw = self.client.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=80
        )
        return raw.parse().choices[0].message.content, raw.headers.get("x-lorakit-revision", "")

    def keeps_running(self, ends: float) -> None:
        if not self.program.is_running():
            raise Failed("the server ended by itself")
        if time.monotonic() > ends:
            raise Failed(f"the server did not come to it in time; {self.program.last_words()}")

    def wait_until(self, what: Callable[[], bool]) -> None:
        ends = time.monotonic() + PATIENCE
        while not what():
            self.keeps_running(ends)
            time.sleep(0.1)


@contextmanager
def serving(screen: Screen, work: Path, base: Path, runs: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = ["serve", base, "--watch", runs, "--port", port, "--", "--max-model-len", 256, "--dtype", "float32"]
    variables = {"LORAKIT_HOME": str(work / "store"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    reasons: list[str] = []

    def is_ready() -> bool:
        """Ask `/ready`; show the reason why it is not when that is a new one."""
        try:
            response = http.get("/ready")
        except httpx.TransportError:
            return False
        reason = response.json().get("error", {}).get("message", "")
        if reason and reason not in reasons:
            reasons.append(reason)
            screen.console.print(f"   [dim]503 {reason}[/]")
        return response.status_code == 200

    with (
        started(
            "lorakit serve", work / "serve.log", [sys.executable, "-m", "lorakit", *command], **variables
        ) as program,
        httpx.Client(base_url=url, timeout=60) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        server = Server(program, http, client)
        server.wait_until(is_ready)
        screen.show("   ready for the openai client")
        yield server


# Programs


def lorakit(log: Path, *arguments: object) -> None:
    run(f"lorakit {arguments[0]}", log, [sys.executable, "-m", "lorakit", *arguments])


def train_base(work: Path, base: Path) -> None:
    program = [sys.executable, EXAMPLES / "train_base.py", "--out", base]
    run("the base's training", work / "base.log", program, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE")


@contextmanager
def training(work: Path, base: Path, run_folder: Path) -> Iterator[Program]:
    behaviour = run_folder.name
    program = [sys.executable, EXAMPLES / "train_adapter.py"]
    arguments = ["--base", base, "--run", run_folder, "--behaviour", behaviour]
    with started(f"the training of {behaviour}", work / f"train-{behaviour}.log", [*program, *arguments]) as trainer:
        yield trainer


if __name__ == "__main__":
    sys.exit(main())

"""Train the embedded default model, write its checkpoint and its report: `python tools/train_nano_r1.py`.

Seeded, resumable (run the same command again), on the CPU. The learning rate follows the active training
time, so that its decay always completes within `--minutes`; how many tokens that takes in depends on the
machine, their order does not.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from nano_r1.data import training_examples
from nano_r1.evaluate import quick_scores
from nano_r1.export import save_model
from nano_r1.model import NanoConfig, NanoR1
from nano_r1.muon import Muon
from nano_r1.report import TrainingRun, measure, ship
from nano_r1.tokenizer import ChatEncoder, save_tokenizer, train_tokenizer
from nano_r1.workers import StepPlan, StepResult, WorkerPool, take_loads
from tokenizers import Tokenizer
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "r1_cluster" / "assets" / "nano_r1"
REPORT = ROOT / "docs" / "nano-r1.md"
TOKENIZER_EXAMPLES = 20000


@dataclass(frozen=True)
class TrainingConfig:
    """One run: everything that decides its result but the speed of the machine."""

    minutes: float = 66.0
    seed: int = 0
    num_tokens: int = 4096
    muon_lr: float = 0.01
    adam_lr: float = 0.006
    weight_decay: float = 0.01
    bias_step: float = 0.002


def schedule(progress: float) -> float:
    """Factor of the learning rate at `progress` (0 to 1): warm-up over 1 %, constant to 30 %, linear to 0."""
    return max(0.0, min(1.0, progress / 0.01 + 0.01, (1 - progress) / 0.7))


def mtp_weight(progress: float) -> float:
    """Weight of the MTP loss: 0.3, then 0.15 from 60 % on."""
    return 0.3 if progress < 0.6 else 0.15


class Trainer:
    """The state of a run and one step of it."""

    def __init__(self, config: TrainingConfig, encoder: ChatEncoder, folder: Path) -> None:
        self.config, self.encoder, self.folder = config, encoder, folder
        torch.manual_seed(config.seed)
        self.model = NanoR1(NanoConfig())
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, param in self.model.named_parameters():
            is_matrix = param.ndim >= 2 and not name.startswith(("embed_tokens", "lm_head"))
            (matrices if is_matrix and not name.endswith("router") else others).append(param)
        self.muon = Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
        self.adam = torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self._adam_params = others
        self.step, self.seconds, self.tokens = 0, 0.0, 0

    @property
    def progress(self) -> float:
        """Share of the active training time that has passed."""
        return self.seconds / (60 * self.config.minutes)

    def train_step(self, pool: WorkerPool) -> StepResult:
        """One update of the parameters and of the balancing biases."""
        started = time.perf_counter()
        c, factor = self.config, schedule(self.progress)
        plan = StepPlan(self.step, c.seed, c.num_tokens, mtp_weight(self.progress))
        result, loads = pool.gradient(plan)
        torch.nn.utils.clip_grad_norm_(self._adam_params, 1.0)
        for optimizer, lr in ((self.muon, c.muon_lr), (self.adam, c.adam_lr)):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for block, load in zip(self.model.moe_layers(), loads, strict=True):
            block.bias += c.bias_step * max(factor, 0.05) * (load.mean() - load).sign()
        self.step += 1
        self.tokens += result.num_tokens
        self.seconds += time.perf_counter() - started
        return result

    def save(self) -> None:
        """Write the resume state; a run cut off in the middle of it keeps the state before."""
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "counters": (self.step, self.seconds, self.tokens),
        }
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def resume(self) -> bool:
        """Take up a saved state of the same configuration, if there is one."""
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        if state["config"] != asdict(self.config):
            raise SystemExit(f"{path} belongs to another configuration: {state['config']}; remove it first")
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.seconds, self.tokens = state["counters"]
        return True


def show_progress(trainer: Trainer, loss: float, mtp_loss: float) -> None:
    """A bar that rewrites itself on a terminal, a line otherwise."""
    bar = ("#" * int(30 * trainer.progress)).ljust(30, ".")
    rate = trainer.tokens / max(trainer.seconds, 1e-9)
    text = (
        f"[{bar}] {trainer.seconds / 60:5.1f}/{trainer.config.minutes:g} min  step {trainer.step}  "
        f"{trainer.tokens / 1e6:.2f}M tokens  {rate:,.0f} tok/s  loss {loss:.4f}  mtp {mtp_loss:.4f}"
    )
    print(text, end="\r" if sys.stdout.isatty() else "\n", flush=True)


def train(trainer: Trainer, pool: WorkerPool) -> None:
    """Run to the end of the schedule, with a progress line, saved states and quick scores on the way."""
    last_shown, last_saved, last_scored = 0.0, trainer.seconds, trainer.seconds
    average = [0.0, 0.0]
    while trainer.progress < 1:
        result = trainer.train_step(pool)
        for index, value in enumerate((result.loss, result.mtp_loss)):
            average[index] = value if trainer.step == 1 else 0.98 * average[index] + 0.02 * value
        if trainer.seconds - last_shown > (1 if sys.stdout.isatty() else 20):
            last_shown = trainer.seconds
            show_progress(trainer, *average)
        if trainer.seconds - last_saved > 120:
            last_saved = trainer.seconds
            trainer.save()
            save_model(trainer.model, trainer.folder)
        if trainer.seconds - last_scored > 480:
            last_scored = trainer.seconds
            print("\n" + quick_scores(trainer.model, trainer.encoder), flush=True)
            take_loads(trainer.model)  # not of the training data
    trainer.save()
    save_model(trainer.model, trainer.folder)


def make_tokenizer(seed: int, folder: Path) -> Tokenizer:
    """The tokenizer of a run begun in `folder`, or a new one trained on examples of the generator."""
    if (folder / "state.pt").exists():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    examples = training_examples(random.Random(f"tokenizer|{seed}"))
    drawn = [next(examples) for _ in range(TOKENIZER_EXAMPLES)]
    tokenizer = train_tokenizer(text for e in drawn for text in (e.prompt, e.thought, e.answer))
    save_tokenizer(tokenizer, folder, NanoConfig().max_position_embeddings)
    return tokenizer


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=TrainingConfig.minutes, help="active training time")
    parser.add_argument("--seed", type=int, default=TrainingConfig.seed)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "nano_r1", help="resume state")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument(
        "--measure-only", action="store_true", help="score the assets and write the report again"
    )
    parser.add_argument("--remark", default="", help="stated in the report, for a run out of the ordinary")
    return parser.parse_args()


def main() -> None:
    """Train (or resume), then write the assets and the report."""
    args = parse_arguments()
    torch.set_num_threads(1)
    if args.measure_only:
        run = TrainingRun(**json.loads((args.assets / "training.json").read_text()))
        measure(args.assets, run, args.report, args.workers)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    encoder = ChatEncoder(make_tokenizer(args.seed, args.work))
    trainer = Trainer(TrainingConfig(minutes=args.minutes, seed=args.seed), encoder, args.work)
    if trainer.resume():
        print(f"resuming at step {trainer.step}, {trainer.seconds / 60:.1f} min", flush=True)
    pool = WorkerPool(trainer.model, encoder, args.workers)
    train(trainer, pool)
    pool.close()
    num_parameters = sum(param.numel() for param in trainer.model.parameters())
    minutes = trainer.seconds / 60
    run = TrainingRun(trainer.step, trainer.tokens, minutes, num_parameters, args.seed, args.remark)
    ship(args.work, args.assets, args.seed)
    measure(args.assets, run, args.report, args.workers)


if __name__ == "__main__":
    main()

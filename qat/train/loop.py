"""The loop of a training: epochs, steps, and going on or back to where it was."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qat.errors import DataError, TrainError
from qat.train import processes
from qat.train.checkpoint import load_state
from qat.train.data import Split
from qat.train.ema import WeightAverage
from qat.train.evaluate import Metrics, check_scores, device_of, evaluate
from qat.train.guard import Guard
from qat.train.hooks import EpochRecord, Hook
from qat.train.log import StepRecord, TrainingLog
from qat.train.objective import Objective
from qat.train.optimizer import make_optimizer, set_rate, trained_parameters
from qat.train.parallel import Part, Replica, own_part, part_of_batch, snapshot_of_first, total
from qat.train.progress import duration, progress
from qat.train.schedule import Prepared, Timetable, rate_factor
from qat.train.settings import TrainSettings
from qat.train.state import Parts, Position, Snapshot, Tally
from qat.train.store import TrainingCheckpoints


class _DivergedError(Exception):
    """Training diverges.

    Args:
        cause: What says so.
        step: Batch of the epoch, from 1.
    """

    def __init__(self, cause: str, step: int) -> None:
        self.step = step
        super().__init__(cause)


class Loop:
    """One training; see `qat.train.trainer.fit` for what the arguments mean."""

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        settings: TrainSettings,
        objective: Objective,
        hooks: Sequence[Hook],
        validation: Split | None,
        store: TrainingCheckpoints | None,
        log: TrainingLog | None,
        say: Callable[[str], None],
        quiet: bool,
        description: str,
    ) -> None:
        self.model, self.split, self.settings, self.objective = model, own_part(split), settings, objective
        self.hooks, self.validation, self.description = hooks, validation, description
        # every process decides alike, and the first one alone writes and speaks
        first = processes.is_first()
        self.keeps, self.store, self.log = store is not None, store if first else None, log if first else None
        self.say, self.quiet = say if first else _silent, quiet or not first
        self.replica = Replica(model)
        self.device = device_of(model)
        self.timetable = Timetable(model, settings, self.split.steps)
        self.optimizer = make_optimizer(model, settings.optimizer, settings.quantizer_lr)
        self.parameters = trained_parameters(self.optimizer)
        self.average = None if settings.ema is None else WeightAverage(model, settings.ema)
        self.parts = Parts(model, self.optimizer, self.average, hooks, Guard(settings.guard))
        self.guard = self.parts.guard
        self.at = Position()
        #: the last state that training can go back to
        self.good: Snapshot | None = None
        self.best: Mapping[str, Tensor] = {}
        #: images whose gradients are summed up since the last step of the optimizer
        self._pending = self._pending_batches = 0
        self._told: set[str] = set()
        self._saved_at = time.monotonic()

    # -- the whole

    def run(self) -> list[EpochRecord]:
        """Train, from the beginning or from where the store has it."""
        self.model.train()
        with self.replica.together() as alone:
            if alone:
                self.say(f"  warning: statistics of {', '.join(alone)} are those of each process's images alone")
            self._begin()
            while self.at.epoch < self.settings.epochs and not self.at.stopped:
                try:
                    self._epoch()
                except _DivergedError as cause:
                    self._go_back(str(cause), cause.step)
            self._finish()
        return self.at.records

    def _begin(self) -> None:
        left_out = self.split.n % self.split.batch_size
        if self.split.drop_last and left_out:
            self.say(
                f"  {left_out} of {self.split.n} training images, others in each epoch, make no whole batch of "
                f"{self.split.batch_size} and are left out (data.last_batch: keep trains on them too)"
            )
        found = snapshot_of_first(self._stored) if self.keeps else None
        if found is None:
            if self.log is not None:
                self.log.begin()
            if self.settings.guard.retries > 0:
                self.good = self._snapshot()
            return
        self._restore(found, "the checkpoint")
        if self.at.best_epoch is not None:
            own = {} if self.store is None else self.store.load_best(self.at.best_epoch)
            self.best = processes.tensors_of_first(own)
        self.good = found
        over = self.at.epoch >= self.settings.epochs or self.at.stopped
        place = "after the last epoch" if over else f"at epoch {self.at.epoch + 1}, step {self.at.step + 1}"
        self.say(f"  resuming {place}")

    def _stored(self) -> Snapshot | None:
        assert self.store is not None
        self.store.require_space(self.parts.size())
        return self.store.latest(self.say)

    def _finish(self) -> None:
        if self.settings.patience is not None and self.best:
            load_state(self.model, self.best, "the best epoch's model")
            self.say(f"  the model of epoch {self.at.best_epoch} is kept")
        elif self.average is not None:
            self.average.store()
        if isinstance(self.model, Prepared):
            self.model.set_phase("quantize")
        self.model.eval()
        if self.log is not None:
            self.log.close()

    # -- an epoch

    def _epoch(self) -> None:
        at = self.at
        self._adjust()
        if at.step == 0:
            for hook in self.hooks:
                hook.epoch_start(self.model, at.epoch)
        bar = progress(
            self.split.remaining(at.epoch, at.step),
            description=f"{self.description} {at.epoch + 1}/{self.settings.epochs}",
            total=self.split.steps,
            initial=at.step,
            quiet=self.quiet,
        )
        start, before = time.perf_counter(), at.seconds
        for done, (x, y) in enumerate(bar, 1):
            self._batch(x.to(self.device), y.to(self.device))
            at.seconds = before + time.perf_counter() - start
            left = (at.seconds - before) / done * (self._steps_in_all() - self._steps_done())
            bar.set_postfix_str(
                f"loss {at.tally.mean:.4f}, top-1 {100 * at.tally.top1:.2f} %, {duration(left)} left", refresh=False
            )
        if self._pending:
            self._update()
        if at.tally.n == 0:
            raise DataError("the train split has no images", "give at least one")
        self._end_epoch()

    def _end_epoch(self) -> None:
        at = self.at
        self._require_finite()
        measured = self._validate()
        record = EpochRecord(
            at.epoch + 1,
            at.tally.mean,
            at.tally.top1,
            at.lr,
            at.seconds,
            None if measured is None else measured.top1,
            None if measured is None else measured.loss,
        )
        at.records.append(record)
        for hook in self.hooks:
            hook.epoch_end(self.model, record)
        self._judge(record)
        if self.log is not None:
            self.log.epoch(record, self._steps_done())
        at.epoch, at.step, at.seconds = at.epoch + 1, 0, 0.0
        at.tally = Tally()
        self._keep()

    def _validate(self) -> Metrics | None:
        if self.validation is None:
            return None
        if self.average is None:
            return evaluate(self.model, self.validation, quiet=self.quiet, description="validate", together=True)
        with self.average.in_place():
            return evaluate(self.model, self.validation, quiet=self.quiet, description="validate", together=True)

    def _judge(self, record: EpochRecord) -> None:
        """Remember the best epoch; end training where there was no better one for too long."""
        at, patience = self.at, self.settings.patience
        if patience is None and (self.validation is None or not self.keeps):
            return
        score = -record.loss if record.validation_top1 is None else record.validation_top1
        if at.best_epoch is None or score > at.best_score:
            at.best_epoch, at.best_score = record.epoch, score
            self.best = self._model_now()
            if self.store is not None:
                self.store.save_best(self.best, record.epoch, score)
        elif patience is not None and record.epoch - at.best_epoch >= patience and record.epoch < self.settings.epochs:
            at.stopped = True
            self.say(f"  no better epoch than {at.best_epoch} in {patience}: training ends after epoch {record.epoch}")

    def _model_now(self) -> dict[str, Tensor]:
        if self.average is None:
            return {k: v.detach().to("cpu", copy=True) for k, v in self.model.state_dict().items()}
        with self.average.in_place():
            return {k: v.detach().to("cpu", copy=True) for k, v in self.model.state_dict().items()}

    # -- a step

    def _batch(self, x: Tensor, y: Tensor) -> None:
        at, settings = self.at, self.settings
        self._adjust()
        part = part_of_batch(int(y.shape[0]))
        if part.smallest == 0 or (part.whole == 1 and self.timetable.trains_norms()):
            self._leave_out(part)
            at.step += 1
            return
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.autocast == "bf16"):
            scores = self.replica(x)
        check_scores(scores, y, "train")
        terms = [term for hook in self.hooks if (term := hook.loss(self.model)) is not None]
        loss = plain = self.objective(x, scores, y)
        for term in terms:
            plain = plain + term
        bad = not math.isfinite(float(plain.detach())) and not bool(torch.isfinite(x).all())
        value, right = total(plain, int((scores.detach().argmax(1) == y).sum()), part, bad=bad)
        cause, count = self.guard.see(value), part.whole
        if bad:
            raise DataError(f"images of epoch {at.epoch + 1}, step {at.step + 1} hold nan or inf", "check the data")
        if cause is not None:
            raise _DivergedError(cause, at.step + 1)
        # what hooks add is not of the images: it is the same in every process
        loss = plain if part.weight == 1.0 else sum(terms, loss * part.weight)
        if self._pending == 0:
            self.optimizer.zero_grad(set_to_none=True)
        # of several batches the sum over images is collected, and divided by their number in `_update`
        (loss if settings.accumulate == 1 else loss * count).backward()  # type: ignore[no-untyped-call]
        at.tally.add(value, right, count)
        at.window.add(value, right, count)
        at.step += 1
        self._pending, self._pending_batches = self._pending + count, self._pending_batches + 1
        if self._pending_batches == settings.accumulate:
            self._update()

    def _update(self) -> None:
        """Let the optimizer take a step, and do what is due after it."""
        at, settings = self.at, self.settings
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if settings.accumulate > 1:
            torch._foreach_div_(gradients, float(self._pending))
        first = at.step - self._pending_batches
        self._pending = self._pending_batches = 0
        norm: float | None = None
        if settings.clip_norm is not None:
            norm = float(nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm))
            if not math.isfinite(norm):
                raise _DivergedError(f"the norm of the gradient is {norm}", at.step)
        step = self._steps_done() - 1
        factor = rate_factor(settings.schedule, step, self.split.steps, settings.epochs)
        at.lr = settings.optimizer.lr * factor * self.guard.rate
        set_rate(self.optimizer, at.lr)
        self.optimizer.step()
        for hook in self.hooks:
            hook.step_end(self.model)
        if self.average is not None:
            self.average.update()
        if self.log is not None and _passes(self.log.every, first, at.step):
            self._log_step(self.log, float(nn.utils.get_total_norm(gradients)) if norm is None else norm)
        if at.step < self.split.steps and self._is_due(first):
            self._require_finite()
            self._keep()

    def _log_step(self, log: TrainingLog, norm: float) -> None:
        at = self.at
        metrics = {f"{hook.name}.{key}": float(v) for hook in self.hooks for key, v in hook.metrics().items()}
        record = StepRecord(at.epoch + 1, self._steps_done(), at.window.mean, at.window.top1, at.lr, norm, metrics)
        log.step(record, self.model)
        at.window = Tally()

    def _adjust(self) -> None:
        """Bring phases and batch norms to where the schedule has them now."""
        begun = self.timetable.begun
        if self.timetable.enter(self._steps_done()):
            self.replica.renew()
            if begun:
                # the loss is of another function from here on
                self.guard.forget()

    def _leave_out(self, part: Part) -> None:
        if part.smallest == 0:
            if "few" not in self._told:
                self._told.add("few")
                self.say(f"  batches that have no image for one of {processes.size()} processes are left out")
            return
        if self.split.batch_size == 1:
            raise DataError(
                "batches of one image cannot train batch norms", "give a larger data.batch_size, or freeze batch norms"
            )
        if "single" not in self._told:
            self._told.add("single")
            self.say("  batches of one image are left out: batch norms cannot be trained on them")

    def _require_finite(self) -> None:
        """Notice broken weights before anything is made of them: no state with such weights is one to return to."""
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters):
            raise _DivergedError("weights are not finite", self.at.step)

    # -- going back and going on

    def _keep(self) -> None:
        """Remember this state, on disk if there is a store."""
        self._saved_at = time.monotonic()
        if not self.keeps and self.settings.guard.retries == 0:
            return
        self.good = self._snapshot()
        if self.store is not None:
            self.store.save(self.good)

    def _is_due(self, first: int) -> bool:
        """Tell whether a checkpoint is due within an epoch; a doubtful state is none to return to."""
        every, seconds = self.settings.checkpoint.every_steps, self.settings.checkpoint.every_seconds
        by_steps = every is not None and _passes(every, first, self.at.step)
        by_time = seconds is not None and time.monotonic() - self._saved_at >= seconds
        if seconds is not None:
            # clocks differ
            by_time = bool(processes.of_each(int(by_time))[0])
        return (by_steps or by_time) and self.guard.calm

    def _snapshot(self) -> Snapshot:
        return self.parts.snapshot(self.at, {"log_lines": 0 if self.log is None else self.log.position()})

    def _restore(self, snapshot: Snapshot, source: str) -> None:
        self.at = self.parts.restore(snapshot, source)
        self.replica.renew()
        self.timetable.forget()
        if self._steps_done():
            # as at the last step, so that a change that is due now is noticed as one
            self.timetable.enter(self._steps_done() - 1)
        self._pending = self._pending_batches = 0
        if self.log is not None:
            self.log.begin(int(snapshot.info["log_lines"]), self._steps_done())

    def _go_back(self, cause: str, step: int) -> None:
        """Go back to the last good state, with a lower rate.

        Raises:
            TrainError: That was done often enough.
        """
        guard, place = self.guard, f"in epoch {self.at.epoch + 1}, step {step}"
        rate, returns = guard.rate, guard.returns
        if self.good is None or not guard.step_back():
            tries = f", also after {returns} returns with rates down to {rate:g} of the asked one" if returns else ""
            raise TrainError(
                f"{cause} {place}{tries}",
                "lower the learning rate, clip the gradient (clip_norm), or check the data",
            )
        rate, returns = guard.rate, guard.returns
        self._restore(self.good, "the last good state")
        guard.forget()
        guard.rate, guard.returns = rate, returns
        epoch = self.at.epoch + 1
        self.say(
            f"  {cause} {place}: back to epoch {epoch}, step {self.at.step + 1}, with {rate:g} of the learning rate"
            f" ({returns} of {self.settings.guard.retries})"
        )
        if self.log is not None:
            self.log.went_back(cause, epoch, self._steps_done(), rate)

    # -- numbers

    def _steps_done(self) -> int:
        return self.at.epoch * self.split.steps + self.at.step

    def _steps_in_all(self) -> int:
        return self.settings.epochs * self.split.steps


def _silent(line: str) -> None:
    """Say nothing."""


def _passes(every: int, before: int, now: int) -> bool:
    """Tell whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every

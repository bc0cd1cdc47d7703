"""A case is a subject that was made. It goes through every check, and no check changes it.

A case knows the model, the batch, the members and their outputs, the optimizer, the loss and the
seed. It can call the model, train it for a step, and put it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ensembles.handling.members import (
    is_one_module,
    member_outputs,
    named_members,
    named_modules_of,
)
from ensembles.handling.state import (
    Snapshot,
    digest_of_state,
    generator_states,
    generators_kept,
    preserved,
    restore_generators,
    seed_generators,
)
from ensembles.handling.training import (
    TrainingParts,
    fresh,
    hidden_modules,
    loss_of,
    optimizers_of,
    plain_sgd,
)
from ensembles.present_run import seed as present_seed
from ensembles.subject import Model, Recipe, Subject
from ensembles.user_calls import ERRORS, asked, raised

__all__ = ["Case", "Given"]

_NOTHING: Any = object()


class Case:
    """A subject that was made, so that every check can look at it.

    Model and batch are made when they are first asked for, under the seed. The model is made first.
    The batch follows, with the generators as `make` left them. Checks put back what they change;
    `digest` proves it.

    Args:
        subject: The recipe.
        seed: Set before the model is made, and before every check. The default is the seed of the
            run.

    Example:
        >>> case = Case.of([nn.Linear(4, 2), nn.Linear(4, 2)], torch.randn(5, 4))
        >>> {name: tuple(y[0].shape) for name, y in case.call().items()}
        {'0': (5, 2), '1': (5, 2)}
        >>> before = case.digest()
        >>> with case.preserved(), torch.no_grad():
        ...     _ = case.model[0].weight.zero_()
        >>> case.digest() == before
        True
    """

    def __init__(self, subject: Subject, *, seed: int | None = None) -> None:
        self.subject = subject
        self.seed = present_seed.get() if seed is None else seed
        self._model: Any = _NOTHING
        self._batch: Any = _NOTHING
        self._after_make: Any = None

    @classmethod
    def of(
        cls,
        model: Given,
        batch: Any = None,
        **recipe: Unpack[Recipe],
    ) -> Case:
        """The case of a model, or of a function that makes it, with a recipe.

        Args:
            model: A module, the members as a list or dict of modules, a function that builds one of
                these, a subject, or a case.
            batch: What the model is called with, or a function that returns it; None if the
                check needs no batch.
            **recipe: Fields of `Subject`.

        Raises:
            ValueError: If the model is none of these, or a recipe comes with a case or subject.
        """
        if isinstance(model, (Case, Subject)):
            if batch is not None or recipe:
                kind = type(model).__name__.lower()
                raise ValueError(f"a {kind} already has a batch and a recipe: give it no others.")
            return model if isinstance(model, Case) else cls(model)
        seed = recipe.pop("seed", None)
        fields: Any = recipe
        given = isinstance(model, nn.Module) or not callable(model)
        if given:
            named_modules_of(model)  # type: ignore[arg-type]
        make: Any = (lambda: model) if given else model
        feed = batch if batch is None or callable(batch) else lambda: batch
        case = cls(Subject(make=make, batch=feed, **fields), seed=seed)
        if given:
            case._model = model
        return case

    @property
    def given(self) -> bool:
        """Whether the model was given as an object, so that it cannot be built anew."""
        return self._after_make is None and self._model is not _NOTHING

    @property
    def model(self) -> Model:
        """The model, made under the seed when it is first asked for.

        Raises:
            ValueError: If `make` raises, or returns no module and no list or dict of modules.
        """
        if self._model is _NOTHING:
            with generators_kept():
                self._model = self.built()
                self._after_make = generator_states()
        return self._model  # type: ignore[no-any-return]

    @property
    def after_make(self) -> Mapping[str, Any] | None:
        """The states in which `make` left the generators; None where the model was given."""
        _ = self.model
        return self._after_make  # type: ignore[no-any-return]

    def built(self, generators: Mapping[str, Any] | None = None) -> Model:
        """A new model; the generators stay as `make` left them.

        Args:
            generators: The states that it is drawn from, such as `after_make` for a model that is
                drawn after the first. By default the generators are seeded.
        """
        __tracebackhide__ = True
        if generators is None:
            seed_generators(self.seed)
        else:
            restore_generators(generators)
        try:
            model = self.subject.make()
        except ERRORS as error:
            what = f"the factory of subject {self.subject.name!r}"
            raise ValueError(raised(what, error, of=self.subject.make)) from error
        named_modules_of(model)
        return model

    @property
    def has_batch(self) -> bool:
        """Whether there is anything to call the model with."""
        return self.subject.batch is not None

    @property
    def batch(self) -> Any:
        """What the model is called with, made once.

        Raises:
            ValueError: If the subject has no batch, or the function raises.
        """
        __tracebackhide__ = True
        if self.subject.batch is None:
            raise ValueError(
                f"subject {self.subject.name!r} has no batch: give Subject(batch=...)."
            )
        if self._batch is _NOTHING:
            _ = self.model  # its draws come first
            then = "It takes no arguments and returns what the model is called with."
            with generators_kept():
                if self._after_make is not None:
                    restore_generators(self._after_make)
                self._batch = asked("batch", self.subject.batch, then=then)
        return self._batch

    # --- the members ----------------------------------------------------------------------------

    @property
    def is_one_module(self) -> bool:
        """Whether the user gave one module; its members, if any, are found inside."""
        return is_one_module(self.model)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that the user gave, by name: {"model": it} for one."""
        return named_modules_of(self.model)

    @property
    def everything(self) -> list[nn.Module]:
        """Every module that a call or a step may change, also those that no module lists."""
        modules = list(self.modules.values())
        return [*modules, *hidden_modules(modules)]

    @property
    def members_known(self) -> bool:
        """Whether each member is a module, rather than only an output."""
        return self.subject.members is not None or not self.is_one_module

    @property
    def members(self) -> dict[str, nn.Module]:
        """The member modules by name; the one module where no others are known."""
        return named_members(self.model, self.subject.members)

    @property
    def data(self) -> dict[int | str, Callable[[], Any]]:
        """For each member, a function that asks the subject for what the member is trained on.

        Each call asks again. The keys are what the subject's `data` is called with: numbers, or the
        names of a dict.

        Raises:
            ValueError: If the subject has no data.
        """
        data = self.subject.data
        if data is None:
            raise ValueError(
                f"subject {self.subject.name!r} has no data: give Subject(data=...), a function "
                "that takes a member and returns its sample indices or its loader."
            )
        if self.members_known:
            names = list(self.members)
        else:
            with self.preserved(), torch.no_grad():
                names = list(self.call())
        numbered = names == [str(i) for i in range(len(names))]
        return {key: partial(data, key) for key in (range(len(names)) if numbered else names)}

    # --- calls and steps ------------------------------------------------------------------------

    def call(self, model: Model | None = None, batch: Any = None) -> dict[str, tuple[Tensor, ...]]:
        """What each member returns, in the present mode.

        Args:
            model: What to call in place of the case's model: some of the members, or a copy.
            batch: What to call it with; it is not copied. By default a copy of the case's batch.
        """
        __tracebackhide__ = True
        called = self.model if model is None else model
        given = fresh(self.batch) if batch is None else batch
        return member_outputs(called, given, outputs=self.subject.outputs)

    def loss(self, outputs: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
        """The training loss of member outputs, a scalar.

        Raises:
            ValueError: If the subject has no loss, or it is no finite scalar tensor.
        """
        __tracebackhide__ = True
        if self.subject.loss is None:
            raise ValueError(
                f"subject {self.subject.name!r} has no loss: give Subject(loss=...), a function "
                "that takes the dict of member outputs."
            )
        return loss_of(self.subject.loss, outputs)

    def optimizers(self, model: Model | None = None) -> tuple[Optimizer, ...]:
        """The optimizers of the model, or of some of its members; plain SGD by default."""
        __tracebackhide__ = True
        trained = self.model if model is None else model
        if self.subject.optimizer is None:
            return (plain_sgd(trained),)
        return optimizers_of(self.subject.optimizer, trained)

    @property
    def parts(self) -> TrainingParts:
        """What of a training step is the user's; the rest is the check's own."""
        given = self.subject
        return TrainingParts(loss=given.loss is not None, optimizer=given.optimizer is not None)

    # --- as before ------------------------------------------------------------------------------

    def preserved(self) -> AbstractContextManager[Snapshot]:
        """Puts the model and the random generators back on exit: see `handling.state`."""
        return preserved(self.everything)

    def digest(self) -> tuple[str, str]:
        """Digests of the model and of the batch; "" for a batch that was not made yet."""
        batch = "" if self._batch is _NOTHING else digest_of_state([self._batch])
        return digest_of_state(list(self.modules.values())), batch

    def is_as(self, digest: tuple[str, str]) -> bool:
        """Whether nothing changed since; a batch that was first made since is not a change."""
        model, batch = self.digest()
        return model == digest[0] and digest[1] in ("", batch)

    @contextmanager
    def checked(self) -> Iterator[Case]:
        """For one check: seeds the generators, and puts them back on exit.

        The seed differs from that of `make`, so that a check draws other numbers than the model.
        """
        with generators_kept():
            _ = self.model
            seed_generators(self.seed + 1)
            yield self

    def having(self, model: Model, **recipe: Unpack[Recipe]) -> Case:
        """The same case with another model: a copy, what it became, or some of its members.

        Args:
            model: In place of the case's own.
            **recipe: Fields of `Subject` in place of the case's own.
        """
        seed = recipe.pop("seed", None)
        fields: Any = recipe
        other = Case(
            replace(self.subject, make=lambda: model, **fields),
            seed=self.seed if seed is None else seed,
        )
        other._model, other._batch = model, self._batch
        return other


Given = Case | Subject | Model | Callable[[], Model]
"""What a check takes: a module, the members, a function that builds them, a subject, or a case."""

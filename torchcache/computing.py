"""Rows that no tier has: forwarded, checked, kept."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torchcache import flights
from torchcache.changed_inputs import InputWatch
from torchcache.draws import Draws
from torchcache.errors import CorruptRecordError, UncacheableError
from torchcache.flights import Flight, Flights
from torchcache.identity import FixedIdentity, Identity
from torchcache.keys.digest import digest_parts
from torchcache.keys.ranks import collectives_done
from torchcache.layout import Found, Rows
from torchcache.notices import Notices
from torchcache.options import CacheOptions
from torchcache.outputs import unsupported_leaf
from torchcache.own_keys import keys_in_force, open_fitting, sealed
from torchcache.padding import PaddedResults, follow_length
from torchcache.recheck import FewRows, Verdicts, Witness, row_distance, tolerance
from torchcache.results import Results
from torchcache.samples import PaddedBatch
from torchcache.storage.contract import Verdict
from torchcache.structure import TooLargeError, Tree
from torchcache.tiers import CachedCall, Tiers, spread

#: So many forms of plain values beside tensors are watched for batch sizes, and of results for what follows a length.
_MOST_FORMS = 1024


@dataclass(frozen=True, slots=True)
class _Answer:
    """The result of the whole call, computed as if there were no cache."""

    result: object


@dataclass(frozen=True, slots=True)
class _Computed:
    """Rows that were forwarded.

    Attributes:
        found: Their values, at the positions of the batch.
        shared: What may be kept and given to others.
        whole: What the caller gets if these are all rows of the call, as they came; None otherwise.
    """

    found: list[Found]
    shared: list[Rows]
    whole: _Answer | None


_NOTHING = _Computed([], [], None)


class Computer:
    """Computes what the tiers of one cache do not have, and some of what they have to see that it is right.

    Args:
        options: Returns the options in force.
        identity: The state that shapes results.
        tiers: Where rows are kept.
        verdicts: What is known of namespaces.
        notices: Counts and says what happens.
    """

    def __init__(
        self,
        options: Callable[[], CacheOptions],
        identity: Identity | FixedIdentity,
        tiers: Tiers,
        verdicts: Verdicts,
        notices: Notices,
    ) -> None:
        self._options = options
        self._identity = identity
        self._tiers = tiers
        self._verdicts = verdicts
        self._notices = notices
        self.flights = Flights()
        self._sizes_of_plain: dict[bytes, set[int]] = {}  # batch sizes that gave equal plain values
        self._followed: dict[bytes, Sequence[Sequence[int]]] = {}  # what of padded results is as long as the mask
        self._chance = random.Random(os.urandom(16))  # noqa: S311 - chooses samples; the global one is the user's

    def compute(
        self, call: CachedCall, found: list[Found], missing: list[int], doubted: list[int], *, can_wait: bool
    ) -> object:
        """Forward the rows that no tier has, equal ones once, and keep what comes back."""
        first: dict[bytes, int] = {}
        for position in missing:
            first.setdefault(call.digests[position], position)
        wanted = list(first.values())
        self._notices.counters.add(duplicates=len(missing) - len(wanted))
        computed: list[Found] = []
        for joins in (can_wait, False):
            flight = Flight(call.namespace)
            shared: list[Rows] = []
            try:
                joined = self.flights.claim(flight, call.rows_at(wanted), joins=joins)
                own = [p for i, p in enumerate(wanted) if i not in joined]
                if self.flights.landings != call.landings and self._options().looks_up and not call.is_unchecked:
                    landed = _opened(call, self._tiers.fetch("memory", call, own)[0])
                    computed += landed
                    have_landed = {p for item in landed for p in item.positions}
                    own = [p for p in own if p not in have_landed]
                outcome = self._forward_rows(call, own, doubted, found) if own or doubted else _NOTHING
                if isinstance(outcome, _Answer):
                    return outcome.result
                if outcome.whole is not None:
                    shared = outcome.shared
                    return outcome.whole.result
                computed, doubted, shared = computed + outcome.found, [], outcome.shared
            finally:
                self.flights.land(flight, shared)
            landed, wanted = self._wait({wanted[i]: other for i, other in joined.items()}, call)
            computed += landed
            if not wanted:
                break
        # What was computed again stands for what was found.
        again = {p for item in computed for p in item.positions}
        found = [part for item in found if (part := _without(item, again)) is not None]
        if len(missing) > len(first):
            computed = spread(computed, call.digests, sorted({*missing, *again}))[0]
        if not call.batch.results.do_stack([*found, *computed]):
            return self.go_around("rows_do_not_stack", call)
        try:
            return self.assemble([*found, *computed], call)
        except CorruptRecordError as error:
            self._notices.error(error, 0)
            return self.go_around("result_cannot_be_rebuilt", call)

    def _wait(self, joined: Mapping[int, Flight], call: CachedCall) -> tuple[list[Found], list[int]]:
        """Take rows from the flights that compute them; also return the positions of those that did not come."""
        by_flight: dict[int, tuple[Flight, list[int]]] = {}
        for position, flight in joined.items():
            by_flight.setdefault(id(flight), (flight, []))[1].append(position)
        if not self.flights.wait(flight for flight, _ in by_flight.values()):
            self._notices.say(
                "waited",
                f"rows that another thread computes did not come within {flights.JOIN_SECONDS:g} seconds. They are "
                "computed here too, and from now on threads do not wait for each other's rows. If what is cached waits "
                "for a thread that asks for the same sample, let that thread call the function without the cache",
            )
        landed: list[Found] = []
        for flight, positions in by_flight.values():
            for rows in flight.rows:
                places = {digest: i for i, digest in enumerate(rows.digests)}
                here = [p for p in positions if call.digests[p] in places]
                if here:
                    landed.append(Found(here, rows.layout, rows.data[[places[call.digests[p]] for p in here]]))
        landed = _opened(call, landed)
        have_landed = {p for item in landed for p in item.positions}
        missing = [p for p in joined if p not in have_landed]
        self._notices.counters.add(shared_rows=len(joined) - len(missing))
        return landed, missing

    def _forward_rows(
        self, call: CachedCall, own: list[int], doubted: list[int], found: Sequence[Found]
    ) -> _Computed | _Answer:
        """Forward rows, with some that are cached beside them, and keep what may be kept.

        Args:
            call: The call.
            own: Positions of the rows that no tier has.
            doubted: Positions of rows that are cached and to be compared.
            found: The values that are cached.
        """
        n = len(own)
        talks_before = collectives_done()
        draws = Draws([*self._identity.generators(), *call.batch.generators])
        # Code that the walk does not see may talk to other ranks, and they forward all rows of a call. So does the
        # first computed call of a namespace in a job, until one shows that it is computed alone.
        is_trial = bool(talks_before) and not self._verdicts.is_alone(call.namespace)
        # Until rows are known to be their own, equal ones may come out different.
        is_whole = is_trial or call.is_unchecked
        is_known = self.knows_rows(call)
        witness = self._find_witness(call) if own and self._options().check_rows and not is_trial else None
        doubted = [] if is_whole else doubted
        positions = [*range(call.batch.n)] if is_whole else [*own, *doubted]
        is_as_given = witness is None and (is_whole or len(positions) == call.batch.n == n)
        args, kwargs, results = call.args, call.kwargs, call.batch.results
        inputs: dict[int, bytes] = {}  # what keys of the user's stand for, before the call can change it
        if call.keys is not None:
            sealed_positions = [*own, *doubted]
            inputs = dict(zip(sealed_positions, call.batch.inputs(sealed_positions), strict=True))
        failure: Exception | None = None
        changed = ""
        output: object = None
        try:
            if not is_as_given:
                args, kwargs, results = call.batch.select(positions, None if witness is None else witness.rows)
            keys = call.keys
            if keys is not None and not is_as_given:
                keys = [keys[p] for p in positions]
                if witness is not None:
                    keys += [witness.key or b""] * witness.n
            watch = InputWatch(call.batch, args, kwargs)
            with torch.no_grad(), keys_in_force(keys):
                output = call.function(*args, **kwargs)
            changed = watch.changed()
        except Exception as error:
            if is_as_given:
                raise
            failure = error
        if failure is not None:
            return self._without_extras(call, own, doubted, found, failure)
        if changed:
            are_own = is_as_given or not call.batch.is_divisible
            return self._answer_changed(call, changed, output, are_own=are_own)
        effect = None
        if draws.are_there():
            effect = "random_numbers"
        elif collectives_done() != talks_before:
            effect = "collectives"  # by code that the walk does not see, such as a library's
        tree = results.flatten(output)
        kind = unsupported_leaf(tree)
        if kind is not None:
            return self._give_back(kind, call, output if is_as_given else None)
        try:
            if isinstance(results, PaddedResults):
                following = effect or self._follow_length(call, positions, tree, results)
                if isinstance(following, str):
                    return _Answer(self.go_around(following, call))
                results = following
            total = len(positions) + (0 if witness is None else witness.n)
            parts, overflowed = results.take_apart(tree, total, self._options().cache_dtype, self._tiers.known)
        except (MemoryError, torch.OutOfMemoryError):
            return self._give_back("out_of_memory", call, output if is_as_given else None)
        except TooLargeError as error:
            return self._give_back("result_too_large", call, output if is_as_given else None, str(error))
        except UncacheableError as error:
            if not call.batch.is_divisible or (is_as_given and self._notices.has_served()):
                self._notices.bypass("unsupported_result", call.batch.n, str(error))
                return _Answer(output)
            if is_as_given:
                raise
            return self._without_extras(call, own, doubted, found, error)
        self._tiers.devices.note(call, self._module_device(), results.devices(tree))
        if effect == "random_numbers" and self._holds_whatever_is_drawn(call, draws, parts):
            effect = None
        self._verdicts.note_effect(call.namespace, effect)
        if effect:
            self._notices.bypass(effect, 0)
        elif is_trial:
            self._verdicts.note_alone(call.namespace)
        is_settled = effect is None and not self._identity.has_moved()
        leaves = [leaf for leaf in tree.leaves if isinstance(leaf, torch.Tensor)]
        tensors = [*call.batch.tensors, *self._identity.parameters(), *leaves]
        computed = _at_positions(_rows_at(parts, own if is_whole and n < call.batch.n else range(n)), own)
        few: FewRows | None = None
        leaves_witness = bool(own) and is_settled and not is_known and witness is None
        if is_settled and own and not (is_known and witness is None):
            apart = [
                self._distance(call, witness.cached, row, parts)
                for row in range(len(positions), total)
                if witness is not None
            ]
            if not is_known and total > 1:
                few = FewRows.of_batch(computed, call.batch, results, self._tiers.known)
            if few is not None:
                allowed = tolerance(tensors, self._options().cache_dtype)
                distance = self._distance_of_few(call, few, total, results, allowed)
                if distance is not None and math.isnan(distance):
                    effect, leaves_witness = self._note_chance(call), False
                elif not few.are_copies or (distance or 0.0) > allowed:
                    apart.append(distance)
                elif witness is None:
                    self._verdicts.note_repeated(call.namespace)
            if not self._agree(call, apart, tensors):
                return self._give_back("rows_depend_on_batch", call, output if is_as_given else None)
        self._notices.counters.add(misses=n)
        if overflowed:
            self._notices.counters.add(overflowed_values=overflowed)
            self._notices.say("overflow", f"cache_dtype={self._options().cache_dtype} made finite values infinite")
        found_again: list[Found] = []
        if is_settled and doubted:
            found_again = self._verify(call, {p: n + i for i, p in enumerate(doubted)}, found, parts, tensors, inputs)
        rows = [_rows_to_keep(call, item, inputs) for item in computed]
        reason = effect or self._reason_to_drop(call, computed, total, is_settled=is_settled)
        if reason:
            self._notices.counters.add_to("dropped_rows", reason, n)
            if not self._options().looks_up:
                self._tiers.forget(call, [call.digests[p] for p in own])
        else:
            for item in rows:
                if self._options().looks_up:
                    self._tiers.keep(call, item)
                else:
                    self._tiers.replace(call, item)
        if leaves_witness:
            # Also where a plain value may be the batch size: one row more settles that.
            self._leave_witness(call, computed, few, total)
        is_whole = is_as_given and results.returns_as_given
        whole = _Answer(results.rounded(tree, self._options().cache_dtype)) if is_whole else None
        if not reason and whole is None:
            # What is kept is the queue's and other threads' as well; the caller gets bytes of its own.
            computed = [Found(item.positions, item.layout, item.data.copy()) for item in computed]
        return _Computed([*computed, *found_again], [] if reason else rows, whole)

    def _holds_whatever_is_drawn(self, call: CachedCall, draws: Draws, parts: Sequence[Found]) -> bool:
        """Tell whether a call that is one sample comes to the same result with the lowest and the highest draws.

        So it does where a library draws a number to decide on what is decided: a transform of probability 1.
        """
        if call.batch.is_divisible or not draws.can_be_tried():
            return False
        (first,) = parts
        try:
            for _ in draws.tries():
                with torch.no_grad():
                    tree = call.batch.results.flatten(call.function(*call.args, **call.kwargs))
                (again,), _ = call.batch.results.take_apart(tree, 1, self._options().cache_dtype, self._tiers.known)
                if again.layout != first.layout or not np.array_equal(again.data, first.data):
                    return False
        except Exception:  # noqa: BLE001 - whatever it raises at unlikely numbers: they matter
            return False
        return True

    def _follow_length(
        self, call: CachedCall, positions: Sequence[int], tree: Tree, results: PaddedResults
    ) -> PaddedResults | str:
        """Find out which dimensions of a padded batch's result follow its length, or why the call cannot be cached.

        The first time, the shortest of its rows is computed once more with another padding, to see what changes.
        """
        form = call.namespace + digest_parts([str(([leaf.dim() for leaf in tree.leaves], tree.paths)).encode()])
        followed = self._followed.get(form)
        if followed is not None:
            return results.following(followed)
        assert isinstance(call.batch, PaddedBatch)
        row = min(range(len(positions)), key=results.spans.length)
        found = self._compute_with_other_padding(call, positions[row], results.spans.width)
        if found is None:
            return "other_length_failed"
        other, other_results = found
        followed = follow_length(tree, results.spans.width, other, other_results.spans.width)
        if followed is None:
            self._condemn(call)
            return "rows_depend_on_batch"
        results, other_results = results.following(followed), other_results.following(followed)
        if self._options().check_rows:
            how = self._options().cache_dtype, self._tiers.known
            parts, _ = results.take_apart(tree, len(results.spans.starts), *how)
            (again,), _ = other_results.take_apart(other, 1, *how)
            if other_results.spans.length(0) < results.spans.length(row):
                return results  # one that was cut shows what follows the length, and no more
            apart = self._distance(call, again, row, parts)
            if apart is None:  # all zeros, as where a mask says what is padding, not what is real
                return "other_length_failed"
            tensors = [*call.batch.tensors, *self._identity.parameters(), *tree.leaves]
            if apart > tolerance(tensors, self._options().cache_dtype):
                self._condemn(call)
                return "rows_depend_on_batch"
        self._followed[form] = followed
        if len(self._followed) > _MOST_FORMS:
            self._followed.pop(next(iter(self._followed)))
        return results

    def _compute_with_other_padding(
        self, call: CachedCall, position: int, width: int
    ) -> tuple[Tree, PaddedResults] | None:
        """Compute a row by itself: as long as it is, or where that is ``width``, with one position more or less."""
        assert isinstance(call.batch, PaddedBatch)
        length = call.batch.spans.length(position)
        failure: Exception | None = None
        for other_width in (length,) if length < width else (width + 1, width - 1):
            try:
                args, kwargs, results = call.batch.alone(position, other_width)
                with torch.no_grad(), keys_in_force(None if call.keys is None else [call.keys[position]]):
                    tree = results.flatten(call.function(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 - whatever a foreign forward raises for another length
                failure = error
                continue
            return tree, results
        self._notices.fault("other_length_failed", f"a row could not be computed with another padding ({failure!r})")
        return None

    def _without_extras(
        self, call: CachedCall, own: list[int], doubted: list[int], found: Sequence[Found], failure: Exception
    ) -> _Computed | _Answer:
        """Go on after another composition of the call's rows failed."""
        if doubted:  # an audit costs nobody a result
            self._notices.fault("verify_hits", f"hits could not be computed again ({failure!r})")
            return self._forward_rows(call, own, [], found) if own else _NOTHING
        return self._answer_whole(call, failure)

    def _give_back(self, reason: str, call: CachedCall, output: object, evidence: str = "") -> _Answer:
        """Answer with ``output``, the whole call's result that cannot be cached; None: compute it."""
        if output is None:
            return _Answer(self.go_around(reason, call, evidence))
        self._notices.bypass(reason, call.batch.n, evidence)
        return _Answer(output)

    def _answer_changed(self, call: CachedCall, argument: str, output: object, *, are_own: bool) -> _Answer:
        """Answer a call that changed an argument as if there were no cache, and let all like it go around it.

        Args:
            call: The call.
            argument: The name of what it changed.
            output: What came of the arguments that were forwarded.
            are_own: Whether these were the caller's own. If not, the call is computed once more, with those.
        """
        self._tiers.forget_namespace(call)
        self._verdicts.note_changed_input(call.namespace)
        self._notices.bypass("input_changed_in_place", call.batch.n, f"argument {argument!r}")
        return _Answer(output if are_own else call.function(*call.args, **call.kwargs))

    def _answer_whole(self, call: CachedCall, failure: Exception) -> _Answer:
        """Compute the call as the caller made it, after another composition of its rows failed.

        If that succeeds, the module may be one that cannot be given any rows together, as caching by samples
        needs. It may also have been a passing fault, so nothing is concluded where rows were found to be their
        own before.
        """
        result = call.function(*call.args, **call.kwargs)
        if _is_out_of_memory(failure):
            self._verdicts.note(call.namespace, None)  # one row more did not fit: not to be tried again
            return self._give_back("out_of_memory", call, result)
        if self._verdicts.of(call.namespace) is Verdict.INDEPENDENT:
            self._verdicts.note(call.namespace, Verdict.INDEPENDENT)  # the witness is not to be tried again
            self._notices.fault(
                "other_batch_failed", f"a call failed with some of its rows, not with all ({failure!r})"
            )
            return self._give_back("other_batch_failed", call, result)
        self._condemn(call)
        return self._give_back("rows_depend_on_batch", call, result)

    def _reason_to_drop(
        self, call: CachedCall, computed: list[Found], n_forwarded: int, *, is_settled: bool
    ) -> str | None:
        """Say why computed rows must not be kept, or None."""
        if not is_settled:
            return "state_moved"
        if n_forwarded > 1 and not self.knows_rows(call) and not self.are_copies(call):
            return "rows_not_checked"
        layout = computed[0].layout if computed else None
        numbers = call.batch.results.plain_numbers(layout, self._tiers.known) if layout and layout.structure else ()
        if layout and numbers:
            # A plain number that equals the batch size may be the batch size: then it holds for no other batch.
            key = call.namespace + digest_parts([layout.structure])
            sizes = self._sizes_of_plain.setdefault(key, set())
            sizes.add(n_forwarded)
            if len(self._sizes_of_plain) > _MOST_FORMS:
                self._sizes_of_plain.pop(next(iter(self._sizes_of_plain)))
            if n_forwarded in numbers and len(sizes) < 2:
                return "plain_value_may_be_batch_size"
        return None

    def _find_witness(self, call: CachedCall) -> Witness | None:
        """Return the row with which this batch can be checked, if it is still to be checked."""
        # What is computed alone is served to batches of one, so there is nothing to find out.
        if not call.batch.is_divisible or call.batch.n == 1:
            return None
        witness = self._verdicts.witness(call.namespace)
        if witness is None or witness.marks != self._identity.marks():
            return None
        has_others = any(digest != witness.digest for digest in call.digests)
        return witness if has_others and (witness.key is not None or call.keys is None) else None

    def _leave_witness(self, call: CachedCall, computed: Sequence[Found], few: FewRows | None, total: int) -> None:
        """Leave a row of the first computed batch, which had ``total`` of them, to be computed with the next one."""
        position = computed[0].positions[0] if few is None else few.witness
        item = next(item for item in computed if position in item.positions)
        i = list(item.positions).index(position)
        # Each row of a padded batch has a length of its own, and one length can be added to a batch.
        n = 1 if isinstance(call.batch, PaddedBatch) else FewRows.witnesses(total)
        witness = Witness(
            rows=call.batch.rows([position] * n),
            n=n,
            digest=call.digests[position],
            cached=Found([position], item.layout, item.data[i : i + 1].copy()),
            marks=self._identity.marks(),
            key=None if call.keys is None else call.keys[position],
        )
        self._verdicts.leave(call.namespace, witness)

    def _distance_of_few(
        self, call: CachedCall, few: FewRows, total: int, results: Results, allowed: float
    ) -> float | None:
        """Compute a few rows once more by themselves; return how far the furthest of them is apart.

        Args:
            call: The call.
            few: The rows.
            total: How many rows they were computed with first.
            results: The form of its results.
            allowed: How far they may be apart.

        Returns:
            None if nothing can be said: the module takes no small batch, or all is zero. NaN if they do not come back
            the same in the same batch either, so that something else than the batch shapes them.
        """
        talks_before = collectives_done()
        draws = Draws([*self._identity.generators(), *call.batch.generators])
        for positions in few.batches(total):
            try:
                parts = self._compute_few(call, positions, results)
                if draws.are_there() or collectives_done() != talks_before or self._identity.has_moved():
                    return None
                if parts is None:
                    return math.inf
                values = [few.values[position] for position in positions]
                apart = self._furthest(call, few, values, parts)
                if apart is None or apart <= allowed:
                    return apart
                again = self._compute_few(call, positions, results)
            except Exception as error:  # noqa: BLE001 - whatever a foreign forward raises for a small batch
                if _is_out_of_memory(error):
                    return None
                continue
            first = [_rows_at(parts, [row])[0] for row in range(len(positions))]
            is_same = again is not None and (self._furthest(call, few, first, again) or 0.0) <= allowed
            return apart if is_same else math.nan
        return None

    def _compute_few(self, call: CachedCall, positions: Sequence[int], results: Results) -> list[Found] | None:
        """Forward the rows at ``positions``, some of which are the same; return None if the result has another form."""
        args, kwargs, form = call.batch.select(positions)
        with torch.no_grad(), keys_in_force(None if call.keys is None else [call.keys[p] for p in positions]):
            tree = form.flatten(call.function(*args, **kwargs))
        if unsupported_leaf(tree) is not None:
            return None
        if isinstance(form, PaddedResults):
            form = form.following(_followed_in(results))
        try:
            parts, _ = form.take_apart(tree, len(positions), self._options().cache_dtype, self._tiers.known)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - a padded result of another form fails anywhere
            return None
        return parts

    def _note_chance(self, call: CachedCall) -> str | None:
        """Note that the same rows came back different in the same batch; return what that is an effect of.

        A name of the user's own vouches that it does not matter.
        """
        if self._options().persistent_module_hash:
            self._verdicts.note(call.namespace, None)
            return None
        self._verdicts.note_effect(call.namespace, "random_numbers")
        self._notices.bypass("random_numbers", 0)
        return "random_numbers"

    def _furthest(
        self, call: CachedCall, few: FewRows, values: Sequence[Found], parts: Sequence[Found]
    ) -> float | None:
        """Return how far the furthest of a few rows is from its value."""
        apart = [self._distance(call, value, row, parts, few.beside(value)) for row, value in enumerate(values)]
        return max((distance for distance in apart if distance is not None), default=None)

    def _agree(self, call: CachedCall, apart: Sequence[float | None], tensors: Sequence[torch.Tensor]) -> bool:
        """Tell whether rows that were computed a second time came back as they were, and remember the verdict.

        Args:
            call: The call.
            apart: How far each comparison found them apart; None where it proves nothing.
            tensors: What took part.
        """
        said = [distance for distance in apart if distance is not None]
        if said and max(said) > tolerance(tensors, self._options().cache_dtype):
            self._condemn(call)
            return False
        if said:
            self._judge(call, Verdict.INDEPENDENT)
        elif apart:
            self._verdicts.note_vacuous(call.namespace)  # another batch may tell
        return True

    def _condemn(self, call: CachedCall) -> None:
        """Note that the rows of a namespace depend on their batch, and forget them all."""
        self._tiers.forget_namespace(call)
        self._judge(call, Verdict.DEPENDENT)

    def _judge(self, call: CachedCall, verdict: Verdict) -> None:
        is_news = self._verdicts.of(call.namespace) is not verdict
        self._verdicts.note(call.namespace, verdict)
        if is_news:
            self._tiers.judge(call, verdict)

    def _distance(
        self,
        call: CachedCall,
        cached: Found,
        row: int,
        parts: Sequence[Found],
        beside: Found | None = None,
        *,
        is_picked: bool = True,
    ) -> float | None:
        """Return how far a known value and what was computed at ``row`` are apart; see ``row_distance``."""
        part = next(item for item in parts if row in item.positions)
        i = list(part.positions).index(row)
        computed = Found([row], part.layout, part.data[i : i + 1])
        how = call.batch.results, self._tiers.known
        return row_distance(cached, computed, beside or part, *how, is_picked=is_picked)

    def _verify(
        self,
        call: CachedCall,
        again: Mapping[int, int],
        found: Sequence[Found],
        parts: Sequence[Found],
        tensors: Sequence[torch.Tensor],
        inputs: Mapping[int, bytes],
    ) -> list[Found]:
        """Compare hits with what they were computed again; what differs is said, counted, replaced, and returned.

        Args:
            call: The call.
            again: For each position that was computed again, at which row of ``parts``.
            found: The values that are cached.
            parts: What was computed.
            tensors: What took part.
            inputs: Digests of inputs that keys of the user's stand for.
        """
        differ: list[Found] = []
        allowed = tolerance(tensors, self._options().cache_dtype)
        cached = {
            p: Found([p], item.layout, item.data[i : i + 1]) for item in found for i, p in enumerate(item.positions)
        }
        self._notices.counters.add(verified_rows=len(again))
        for position, row in again.items():
            apart = self._distance(call, cached[position], row, parts, is_picked=False)
            if apart is None or apart <= allowed:
                continue
            digest = call.digests[position]
            self._notices.counters.add(mismatched_rows=1)
            self._notices.say(
                "verify_hits",
                f"the cached value of sample {position} ({digest.hex()}) is {apart:.2g} of its norm away from what "
                f"was computed again, more than {allowed:g}; it is replaced"
                + ("" if self._options().writes else ", in memory only since mode='read'")
                + ". Look at explain() for what the key misses",
            )
            (item,) = _at_positions(_rows_at(parts, [row]), [position])
            self._tiers.replace(call, _rows_to_keep(call, Found(item.positions, item.layout, item.data.copy()), inputs))
            differ.append(item)
        return differ

    def assemble(self, found: Sequence[Found], call: CachedCall) -> object:
        """Make the result of a call from its rows, on the devices where such a call has it."""
        n_leaves = len(found[0].layout.leaves)
        module_device = self._module_device()
        devices = self._tiers.devices.of(call, module_device)
        if len(devices) != n_leaves:
            devices = (module_device or call.batch.first_device,) * n_leaves
        return call.batch.results.assemble(found, call.batch.n, devices, self._tiers.known)

    def _module_device(self) -> torch.device | None:
        parameters = self._identity.parameters()
        return parameters[0].device if parameters else None

    def knows_rows(self, call: CachedCall) -> bool:
        """Tell whether it was found out if rows of a call depend on their batch, or is not to be."""
        if not self._options().check_rows or not call.batch.is_divisible:
            return True
        return self._verdicts.of(call.namespace) is not Verdict.UNKNOWN

    def are_copies(self, call: CachedCall) -> bool:
        """Tell whether a call has one sample, however often, and that does not matter."""
        return len(set(call.digests)) == 1 and self._verdicts.is_repeated(call.namespace)

    def choose(self, found: Sequence[Found]) -> list[int]:
        """Choose the hits that are computed again for ``verify_hits``."""
        share = self._options().verify_hits
        return sorted(p for item in found for p in item.positions if self._chance.random() < share)

    def go_around(self, reason: str, call: CachedCall, evidence: str = "") -> object:
        """Compute a call as if there were no cache, and note why."""
        self._notices.bypass(reason, call.batch.n, evidence)
        return call.function(*call.args, **call.kwargs)


def _rows_to_keep(call: CachedCall, computed: Found, inputs: Mapping[int, bytes]) -> Rows:
    """Return computed rows as they are kept: where keys of the user's stand for the inputs, with a digest of these."""
    rows = Rows([call.digests[p] for p in computed.positions], computed.layout, computed.data)
    return rows if call.keys is None else sealed(rows, [inputs[p] for p in computed.positions])


def _opened(call: CachedCall, found: list[Found]) -> list[Found]:
    """Return rows that came from another thread as values; sealed ones only if they are of the call's inputs."""
    return found if call.keys is None else open_fitting(call.batch, found)


def _followed_in(results: Results) -> Sequence[Sequence[int]]:
    assert isinstance(results, PaddedResults)
    assert results.followed is not None
    return results.followed


def _rows_at(parts: Sequence[Found], rows: Sequence[int]) -> list[Found]:
    """Return what was computed at some rows, in their order and numbered anew."""
    if len(parts) == 1:  # all rows, in order
        (part,) = parts
        data = part.data[rows.start : rows.stop] if isinstance(rows, range) else part.data[list(rows)]
        return [Found(range(len(rows)), part.layout, data)] if rows else []
    number = {row: i for i, row in enumerate(rows)}
    picked = [(part, [i for i, row in enumerate(part.positions) if row in number]) for part in parts]
    return [
        Found([number[part.positions[i]] for i in here], part.layout, part.data[here]) for part, here in picked if here
    ]


def _at_positions(found: Sequence[Found], positions: Sequence[int]) -> list[Found]:
    """Return values whose positions are numbers of ``positions`` at those."""
    return [Found([positions[i] for i in item.positions], item.layout, item.data) for item in found]


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out; on the CPU and in libraries, torch says so with a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("alloc" in text or "out of memory" in text)


def _without(item: Found, positions: set[int]) -> Found | None:
    """Return what was found without some positions; None if nothing is left."""
    kept = [i for i, position in enumerate(item.positions) if position not in positions]
    if len(kept) == len(item.positions):
        return item
    return Found([item.positions[i] for i in kept], item.layout, item.data[kept]) if kept else None

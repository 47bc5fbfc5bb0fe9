"""Build the forms a step could take, price them, keep the cheapest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from passes.graph import print_graph
from passes.joint import Roles
from passes.nest import Site
from passes.price import evaluated, size_hints
from passes.strategies import CONTRACTION, NAMES, TAYLOR
from rewriter.as_written import AsWritten
from rewriter.bounds import bound_of
from rewriter.errors import NotRewritten, OptionError
from rewriter.forms import AS_WRITTEN, REVERSE, Candidate, Form, Forms
from rewriter.options import Options
from rewriter.recall import Recollection
from rewriter.search import Search, preference

# Each form takes 0.2 to 2 s to trace, one of thousands of operators 2 ms for each.
MOST_FORMS = 6
MOST_FORMS_MEASURED = 16
MOST_OPERATORS = 16_000
MOST_OPERATORS_MEASURED = 48_000
MOST_FINALISTS = 3
# Where the first two are refused they fall back on the third, and that on the fourth: the last ones
# are rarely the best. Each is tried while there are at most half as many operators in all forms as
# there may be for the one before it.
_BY_PROMISE = (CONTRACTION, TAYLOR, *NAMES[:2])
# A step is about three times its value, and the bound at most twice.
WORTH_A_BOUND = 2 / 3
FINALISTS_WITHIN = 1.5


@dataclass(frozen=True)
class Choice:
    """The form taken.

    Attributes:
        taken: The candidate.
        candidates: Every candidate that was priced.
        form: The derivative graph with each site in its form.
        joint: Loss, state updates and gradients as one graph.
        build_seconds: Time to build ``form``.
        trace_seconds: Time to trace and simplify ``joint``.
        asked: Site name → the strategy that the user asked for.
        refusals: (site name, strategy) → reason.
        untried: Changes of sites that are alike, or of all sites, that looked worth a trial when
            there were enough forms, or enough operators in them.
        at_least: Sites, those together that depend on one another → the FLOPs that every other
            strategy costs there at least; more than the form taken, so none was traced.
        finalists: What ``mode="max-autotune"`` compares by the clock, the cheapest first; empty
            where there is nothing to compare, or where it has been done.
        is_recalled: Whether an earlier process chose, so that nothing else was priced in this one.
    """

    taken: Candidate
    candidates: tuple[Candidate, ...]
    form: GraphModule
    joint: GraphModule
    build_seconds: float
    trace_seconds: float
    asked: Mapping[str, str] = field(default_factory=dict)
    refusals: Mapping[tuple[str, str], str] = field(default_factory=dict)
    untried: int = 0
    at_least: Mapping[frozenset[str], int] = field(default_factory=dict)
    finalists: tuple[Form, ...] = ()
    is_recalled: bool = False

    @property
    def rewritten(self) -> list[str]:
        """The sites that are not as written."""
        names = self.taken.strategies.items()
        return [name for name, strategy in names if strategy not in (AS_WRITTEN, REVERSE)]


def choose(
    module: GraphModule,
    roles: Roles,
    seeded: bool,
    captured: GraphModule,
    as_written: AsWritten,
    promoted: Sequence[int],
    options: Options,
    *,
    recalls: bool = False,
) -> Choice:
    """Price forms on the joint graph and take the first by `Candidate.preference`: fewest FLOPs, on
    a tie the earlier strategies, then fewer bytes.

    Every strategy is tried at all sites at once, then site by site where that can pay
    (`rewriter.search`). The loss as written is a candidate too. Its FLOPs are known without tracing
    it, so it is traced only if it wins, or to be timed.

    Args:
        module: The derivative graph.
        roles: What its inputs and outputs are.
        seeded: Whether the outputs' cotangents are inputs of the joint graph.
        captured: The loss as written.
        as_written: What it costs.
        promoted: Inputs that the loss itself makes require grad.
        options: The user's wishes.
        recalls: Whether to take what an earlier process chose, and to keep what this one chooses:
            see `rewriter.recall`.

    Raises:
        OptionError: ``strategy`` names a site that does not exist, or a strategy that a site does
            not accept.
        NotRewritten: With ``strict``, a site that accepts no rewriting strategy.
    """
    forms = Forms(module, roles, seeded=seeded)
    asked = _asked(forms.sites, options)
    memory = None
    if recalls and not (asked or options.strict or options.is_measured) and forms.sites:
        memory = Recollection(module, roles, seeded=seeded)
        found = _recalled(memory, forms, lambda: forms.build_as_written(captured, promoted))
        if found is not None:
            return sole_choice(found)
    written = evaluated(as_written.flops, size_hints(module))
    tried, untried = list[Form](), 0
    at_least = {} if asked or options.is_measured else _ruled_out(forms, roles, written)
    if len(asked) < len(forms.sites) or set(asked.values()) != {AS_WRITTEN}:
        settled = {name: TAYLOR for part in at_least for name in part}
        search = _searched(forms, asked, settled, options)
        tried, untried = list(search.tried), search.untried
    may_be_written = set(asked.values()) <= {AS_WRITTEN}
    least = min((form.candidate.flops for form in tried), default=written + 1)
    if may_be_written and (least > written or options.is_measured):
        tried.append(forms.build_as_written(captured, promoted))
    best = min(tried, key=preference)
    refusals = _refusals(forms, tried)
    _refuse_if_strict(forms.sites, asked, refusals, best.candidate, options)
    if memory is not None and _can_be_recalled(best.candidate.strategies):
        memory.keep(best.candidate)
    return _choice(
        best,
        tried,
        asked=asked,
        refusals=refusals,
        untried=untried,
        at_least=at_least,
        finalists=_finalists(tried, written) if options.is_measured else (),
    )


def sole_choice(form: Form) -> Choice:
    """Return a form that another process has chosen, where nothing else was priced."""
    return _choice(form, [form], is_recalled=True)


def _choice(taken: Form, tried: Sequence[Form], **known: Any) -> Choice:
    return Choice(
        taken=taken.candidate,
        candidates=tuple(form.candidate for form in tried),
        form=taken.module,
        joint=taken.joint,
        build_seconds=taken.build_seconds,
        trace_seconds=taken.trace_seconds,
        **known,
    )


def _recalled(
    memory: Recollection, forms: Forms, build_as_written: Callable[[], Form]
) -> Form | None:
    """Return the form that an earlier process chose, if it is what it was."""
    strategies = memory.strategies() or {}
    names = {site.name for site in forms.sites}
    if strategies.keys() != names or not _can_be_recalled(strategies):
        return None
    is_written = AS_WRITTEN in strategies.values()
    form = build_as_written() if is_written else forms.build(strategies)
    return form if memory.fits(form.candidate) else None


def _can_be_recalled(strategies: Mapping[str, str]) -> bool:
    """Whether the form can be built from the names of its strategies."""
    names = set(strategies.values())
    return names == {AS_WRITTEN} or names.issubset(NAMES)


def _ruled_out(forms: Forms, roles: Roles, written: int) -> dict[frozenset[str], int]:
    """Return what any other strategy costs at least where Taylor mode costs less than that: then
    the others, whose graphs are the largest, need not be traced."""
    names = [site.name for site in forms.sites]
    if not names:
        return {}
    wish = dict.fromkeys(names, TAYLOR)
    contracted = {name for name, strategy in forms.taken(wish).items() if strategy == TAYLOR}
    parts = [part for part in forms.parts() if part <= contracted]
    if not parts:
        return {}
    taylor = forms.build(wish).candidate
    if taylor.flops > WORTH_A_BOUND * written:
        return {}
    bound = bound_of(forms.module, roles, names)
    return {part: bound.on(part) for part in parts if bound.exceeds(taylor, part)}


def _searched(
    forms: Forms, asked: Mapping[str, str], settled: Mapping[str, str], options: Options
) -> Search:
    """Return a finished search among the forms that have what the user asks for.

    Raises:
        OptionError: There is none.
    """

    def build(wish: Mapping[str, str]) -> Form | None:
        form = forms.build({**wish, **asked})
        return None if _disobeyed(forms, form, asked) else form

    names = [site.name for site in forms.sites]
    measured = options.is_measured
    most = MOST_OPERATORS_MEASURED if measured else MOST_OPERATORS
    found: dict[str, Form] = {}
    skipped = 0
    for position, strategy in enumerate(_BY_PROMISE):
        wish = {**dict.fromkeys(names, strategy), **settled, **asked}
        if strategy not in NAMES[:2] and strategy not in forms.taken(wish).values():
            continue
        have = _distinct(found.values())
        if have and sum(form.candidate.nodes for form in have) >= most >> position:
            # Where the others are refused at all sites, this is what they have fallen back on.
            skipped += bool(names) and all(
                {*form.candidate.strategies.values()} != {strategy} for form in have
            )
            continue
        form = build(wish)
        if form is not None:
            found[strategy] = form
    first = _distinct([found[strategy] for strategy in NAMES if strategy in found])
    if not first:
        wish = {**dict.fromkeys(names, NAMES[0]), **settled, **asked}
        raise _refused(forms, wish, asked)
    limit = MOST_FORMS_MEASURED if measured else MOST_FORMS
    search = Search(first, build, forms.alike(), limit, most)
    search.untried += skipped
    search.run(thorough=measured)
    return search


def _distinct(found: Iterable[Form]) -> list[Form]:
    return list({id(form): form for form in found}.values())


def _disobeyed(forms: Forms, form: Form, asked: Mapping[str, str]) -> list[str]:
    """Return the sites where a form has another strategy than the user asks for."""
    took = form.candidate.strategies
    return [n for n, wish in asked.items() if took[n] != wish and (n, wish) in forms.refusals]


def _refused(forms: Forms, wish: Mapping[str, str], asked: Mapping[str, str]) -> OptionError:
    name = _disobeyed(forms, forms.build(wish), asked)[0]
    (site,) = [site for site in forms.sites if site.name == name]
    accepted = [*forms.accepted(name, wish), AS_WRITTEN]
    return OptionError(
        f"strategy: {name} at {site.where} does not accept {asked[name]!r}: "
        f"{forms.refusals[name, asked[name]]}. It accepts {', '.join(accepted)}"
    )


def _finalists(tried: Sequence[Form], written: int) -> tuple[Form, ...]:
    """Return the forms that are worth being timed, the cheapest first: each graph once, none dearer
    than the loss as written."""
    ranked = sorted(tried, key=preference)
    least = ranked[0].candidate.flops
    limit = max(least, min(written, FINALISTS_WITHIN * least))
    near = [form for form in ranked if form.candidate.flops <= limit]
    by_text: dict[str, Form] = {}
    for form in near:
        by_text.setdefault(print_graph(form.joint), form)
    finalists = tuple(by_text.values())[:MOST_FINALISTS]
    return finalists if len(finalists) > 1 else ()


def _asked(found: Sequence[Site], options: Options) -> dict[str, str]:
    """Return the strategies the user names, by site."""
    if isinstance(options.strategy, str):
        asked = {site.name: options.strategy for site in found}
    else:
        asked = dict(options.strategy)
    names = [site.name for site in found]
    for name in asked:
        if name not in names:
            raise OptionError(
                f"strategy: there is no site {name!r}; the sites are {', '.join(names) or 'none'}"
            )
    return {name: strategy for name, strategy in asked.items() if strategy != "auto"}


def _refusals(forms: Forms, tried: Sequence[Form]) -> dict[tuple[str, str], str]:
    """Return what was refused and is in no form; that a first derivative is no second one, and that
    a gradient is no Jacobian, needs no word."""
    took = {item for form in tried for item in form.candidate.strategies.items()}
    took |= {(site.name, TAYLOR) for site in forms.sites if site.order == 1}
    took |= {(site.name, CONTRACTION) for site in forms.sites if "jacobian" not in site.operator}
    found = {key: reason for key, reason in forms.refusals.items() if key not in took}
    return dict(sorted(found.items(), key=lambda item: NAMES.index(item[0][1])))


def _refuse_if_strict(
    found: Sequence[Site],
    asked: Mapping[str, str],
    refusals: Mapping[tuple[str, str], str],
    taken: Candidate,
    options: Options,
) -> None:
    for site in found:
        reason = refusals.get((site.name, NAMES[0]))
        is_left = taken.strategies[site.name] == REVERSE and site.name not in asked
        if options.strict and is_left and reason:
            raise NotRewritten(
                f"strict=True: {site.name} at {site.where} would stay as written: {reason}"
            )

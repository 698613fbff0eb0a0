"""Searches that begin alike: one takes its first removals over from another that is recorded.

The search spaces of table 3 begin with the same stage, which some take further than others. As long as the same kinds
compete in the same groups, on the same model and data, a search repeats what another has found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from . import records
from .plan import COUNTS, Plan, Stage, shared_removals
from .profiles import Profile
from .records import Record, Request
from .savings import MEASURED


def removals_before(profile: Profile, model: str, study: str, before: Iterable[str]) -> int:
    """How many removals a study's search will take over, where the searches of those before are recorded by then.

    Savings that are measured differ from search to search, so what was chosen by them is not taken over.
    """
    own = profile.searches[study]
    asked = _asked(profile, model, study)
    alike = (profile.searches[other] for other in before if _asked(profile, model, other) == asked)
    if own.options.get("per") in MEASURED:
        return 0
    return max((shared_removals(own.plan_stages, other.plan_stages) for other in alike), default=0)


def _asked(profile: Profile, model: str, study: str) -> tuple[object, ...]:
    """What decides a study's search but its stages: its options, the kinds that it weighs, and its data."""
    settings = profile.searches[study]
    weighed = set(settings.kinds) if "per" in settings.options else None
    return settings.options, weighed, profile.calibration_in(study, model)


def taken_over(request: Request, stages: Sequence[Stage], root: Path) -> Plan | None:
    """The beginning of a search, from the recorded one that shares most of its removals; None if none shares any.

    request: of the search's record, with its stages in `spec`; root: the folder of the records. All that decides a
    search but its stages has to be the same. The plan's provenance names the record ("taken_over").
    Raises RecordError for a broken record.
    """
    own = records.path(root, request.profile, request.study, request.model.name, request.setting)
    found: list[tuple[int, Plan, Record]] = []
    for record in records.find(root, profile=request.profile, model=request.model.name, setting=request.setting):
        place = records.path(root, record.profile, record.study, record.model.name, record.setting)
        if place != own and record.plan is not None and _is_alike(record, request):
            plan = Plan.model_validate(record.plan)
            found.append((shared_removals(stages, plan.stages), plan, record))
    most = max(found, key=lambda one: one[0], default=None)
    return _beginning(*most, stages) if most is not None and most[0] else None


def _is_alike(record: Record, request: Request) -> bool:
    """Whether a request with the stages of the record would be the record's."""
    spec = {**request.spec, "stages": record.spec.get("stages")}
    as_theirs = request.model_copy(update={"study": record.study, "spec": spec})
    return as_theirs.inputs_fingerprint() == record.inputs


def _beginning(shared: int, plan: Plan, record: Record, stages: Sequence[Stage]) -> Plan:
    """The first removals of a plan as those of a search with other stages that has done nothing itself."""
    counts = dict.fromkeys(COUNTS, 0) if "passes" in plan.provenance else {}
    provenance = plan.provenance | counts
    ties = [entry for entry in provenance["ties_within_error"] if entry["removal"] <= shared]
    saved = {unit: values[:shared] for unit, values in provenance.get("saved", {}).items()}
    origin = {"study": record.study, "removals": shared, "checksum": records.checksum(record)}
    provenance |= {"ties_within_error": ties, "taken_over": origin, **({"saved": saved} if saved else {})}
    return plan.first(shared).model_copy(update={"stages": list(stages), "provenance": provenance})

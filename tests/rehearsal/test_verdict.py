"""The verdict on a fault, and its table; `make rehearsal` causes the faults."""

from collections import Counter
from typing import Any
from unittest.mock import MagicMock

import pytest

from tests.rehearsal.__main__ import TABLE, options, seeded, selected
from tests.rehearsal.faults import FAULTS, Cause, nodes_killed, power_cut
from tests.rehearsal.verdict import KINDS, Facts, Goal, Row, Sent, goals, judge, seconds_with_two, table

BEGAN, ENDED = 100.0, 140.0
RIGHT = [Sent(kind, BEGAN + number, BEGAN + number + 0.1, 200, True, True) for number, kind in enumerate(KINDS)]
ALL = Goal(never=KINDS)


def failing(kind: str, began: float, status: int | str = 503, settled: bool = True) -> Sent:
    return Sent(kind, BEGAN + began, BEGAN + began + 1, status, False, settled)


def problems(goal: Goal, *failed: Sent, **different: Any) -> list[str]:
    facts = Facts(True, BEGAN, ENDED, [*RIGHT, *failed], 0, 0, 1.5)
    return judge("a fault", "8/s", goal, facts._replace(**different)).problems


def test_a_fault_that_costs_nothing_meets_the_strictest_goal() -> None:
    assert problems(ALL) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_that_may_not_be_is_a_problem(kind: str) -> None:
    assert problems(ALL, failing(kind, 1)) == [f"1 {kind}s failed (503: 1)"]
    assert problems(Goal(), failing(kind, 1)) == []


def test_it_is_a_problem_if_what_should_be_refused_gets_anything_but_503() -> None:
    goal = Goal(refuses=5)
    assert problems(goal, failing("read", 6)) == []
    assert problems(goal) == ["vacuous: nothing was refused"]
    late = failing("order", 4, "hung"), failing("read", 39.5, 504), RIGHT[0]._replace(began=ENDED, ended=ENDED + 1)
    assert problems(goal, failing("read", 6), *late) == []
    others = failing("order", 6, "hung"), failing("read", 7, 504), RIGHT[0]._replace(began=BEGAN + 8, ended=BEGAN + 9)
    assert problems(goal, *others) == ["3 requests sent after 5 s did not get 503 (hung: 1, 504: 1, 200: 1)"]


def test_access_tokens_asked_for_by_force_and_two_at_once_are_problems() -> None:
    goal = Goal(forced=2, two_tokens=2)
    assert problems(goal, forced=2, two_tokens=2.0) == []
    assert problems(goal, forced=3) == ["3 access tokens were asked for by force"]
    assert problems(goal, forced=1, two_tokens=2.1) == ["two access tokens were in use for 2.1 s"]
    assert problems(goal) == ["vacuous: no access token was asked for by force"]


def test_two_access_tokens_are_in_use_from_the_first_use_of_one_to_the_last_of_an_older_one() -> None:
    assert seconds_with_two([]) == 0
    assert seconds_with_two([[100, 104], [], [105, 109]]) == 0
    assert seconds_with_two([[100, 104], [102.5, 103], [103.5, 109]]) == 1.5


def test_only_what_was_on_its_way_may_fail() -> None:
    goal = Goal(in_flight=("read",))
    assert problems(goal, failing("read", -0.5), failing("order", 2)) == []
    assert problems(goal, failing("read", 0.5, "hung")) == ["1 reads sent during it failed (hung: 1)"]


def test_what_ended_before_the_fault_does_not_count() -> None:
    assert problems(ALL, failing("read", -3)) == []


def test_what_fails_again_is_a_problem() -> None:
    goal = Goal(after_retry=("order",))
    assert problems(goal, failing("order", 1)) == []
    assert problems(goal, failing("order", 1, settled=False)) == ["1 orders failed in the end (503: 1)"]


def test_a_failure_too_late_is_a_problem() -> None:
    assert problems(Goal(moved=30), failing("read", 30)) == []
    assert problems(Goal(moved=30), failing("read", 30.5)) == ["1 requests sent after 30 s failed (503: 1)"]


def test_what_returns_may_cost_something_if_the_goal_says_so() -> None:
    goal = Goal(moved=30, returning=10)
    assert problems(goal, failing("read", 41), failing("order", 49)) == []
    for began in (39, 51):
        assert problems(goal, failing("read", began)) == ["1 requests sent after 30 s failed (503: 1)"]
    assert problems(Goal(moved=30), failing("read", 41)) == ["1 requests sent after 30 s failed (503: 1)"]


@pytest.mark.parametrize(
    ("different", "problem"),
    [
        ({"happened": False}, "vacuous: it did not happen"),
        ({"sent": RIGHT[:2]}, "vacuous: not all kinds of requests were sent"),
        ({"lost": 1}, "1 lost"),
        ({"doubled": 2}, "2 doubled"),
        ({"strength": None, "lacking": ["a replica"]}, "not back at full strength: a replica"),
        ({"complaints": ["order: 500", "order: 500"]}, "order: 500 (2 ×)"),
    ],
)
def test_what_no_fault_may_cost_is_a_problem_whatever_the_goal(different: dict[str, Any], problem: str) -> None:
    assert problems(Goal(), **different) == [problem]


def test_the_bug_must_be_seen() -> None:
    assert seeded(Row("bug", lost=1, doubled=1, problems=["1 lost", "1 doubled"])).problems == []
    for row in (Row("bug", lost=1), Row("bug", doubled=1)):
        assert seeded(row).problems == ["the checker does not see it"]


def test_the_table_has_what_was_counted() -> None:
    sent = [*RIGHT, failing("read", 0.5), failing("order", 2), failing("order", 4, settled=False)]
    sent.append(failing("login", 3, settled=False))
    rows = [
        judge("a fault", "8/s", Goal(never=("login",)), Facts(True, BEGAN, ENDED, sent, 2, 1, 12.25)),
        judge("none", "8/s", Goal(two_tokens=2), Facts(True, BEGAN, ENDED, RIGHT, 0, 0, 0.04, two_tokens=0.3)),
        judge("worse", "8/s", Goal(), Facts(True, BEGAN, ENDED, RIGHT, 0, 0, None, ["a site"])),
    ]
    assert table(rows) == (
        "| fault | load | requests | failed | acknowledged, lost | doubled | first failure, s | last failure, s |"
        " two access tokens, s | full strength, s |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
        "| a fault | 8/s | 8 | read 1, login 1, order 2; sent again 1; **2 lost**; **1 doubled**;"
        " **1 logins failed (503: 1)** | 4, 2 | 1 | 0.5 | 4.0 | – | 12.2 |\n"
        "| none | 8/s | 4 | 0 | 3, 0 | 0 | – | – | 0.3 | 0.0 |\n"
        "| worse | 8/s | 4 | 0; **not back at full strength: a site** | 3, 0 | 0 | – | – | – | never |\n"
    )


def test_the_goals_are_said_in_words() -> None:
    assert goals(
        [
            ("a", ALL),
            ("b", Goal(in_flight=("read",), after_retry=("order",), moved=30)),
            ("c", Goal()),
            ("d", Goal(moved=30, returning=10)),
            ("e", Goal(refuses=5)),
            ("f", Goal(forced=2, two_tokens=2)),
        ]
    ) == (
        "| fault | goal |\n"
        "|---|---|\n"
        "| a | no read, login, order or unkeyed order fails |\n"
        "| b | of reads at most those fail that were on their way; no order fails when it is sent again;"
        " what is sent after 30 s is served |\n"
        "| c | nothing acknowledged is lost or doubled |\n"
        "| d | what is sent after 30 s is served, but in the first 10 s of the repair |\n"
        "| e | what is sent after 5 s gets 503 until the repair begins |\n"
        "| f | WeChat is asked by force for at most 2 access tokens; two are in use for at most 2 s |\n"
    )


def test_words_and_the_short_form_select_faults() -> None:
    assert [fault for fault in FAULTS if selected(fault, options([]))] == FAULTS
    quick = [fault for fault in FAULTS if selected(fault, options(["--quick"]))]
    assert quick == [fault for fault in FAULTS if fault.quick]
    assert {fault.name for fault in FAULTS if selected(fault, options(["control"]))} == {"none (control)"}


def test_the_table_that_is_kept_has_all_faults_and_missed_no_goal() -> None:
    text = TABLE.read_text()
    assert goals((fault.name, fault.goal) for fault in FAULTS) in text
    assert all(f"\n| {fault.name} | 8/s |" in text for fault in FAULTS)
    assert "**" not in text


def test_each_fault_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(fault.name for fault in FAULTS).items() if count > 1] == []


@pytest.mark.parametrize(
    ("cause", "repair"),
    [(nodes_killed(lambda stage: stage.galera.nodes[:1]), "galera.join"), (power_cut, "restore_power")],
)
def test_a_proof_that_raises_leaves_nothing_down(cause: Cause, repair: str) -> None:
    stage = MagicMock(**{"galera.nodes": [MagicMock() for _ in range(3)]})
    with pytest.raises(ZeroDivisionError), cause(stage):
        raise ZeroDivisionError
    assert repair in {name for name, _, _ in stage.mock_calls}

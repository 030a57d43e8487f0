"""What Prefect's server does by itself about our runs: finds dead ones, goes on with them, tells of failures.

Only runs with the tag TAG are touched, which every deployment gives to its runs: a server may have others' flows too.
"""

from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, PauseAutomation, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

TAG = "gpt2"
BEAT_LIMIT_SECONDS = 90  # three heartbeats of PREFECT_FLOWS_HEARTBEAT_FREQUENCY, as the deployments set it
SETTLE_SECONDS = 20  # a worker reports a crash twice: the second report would hit a run that was started again at once
CRASHES, CRASH_MINUTES = 8, 15  # a run that dies at once is tried so often; each zombie takes two minutes

ZOMBIES, RESUME, LOOP, NOTIFY = (
    "gpt2: a run that is not heard of any more has crashed",
    "gpt2: a crashed run goes on",
    "gpt2: too many crashes stop the automatic restart",
    "gpt2: tell of a failed run",
)


def zombies() -> AutomationCore:
    """A run whose worker and process died says nothing: without a heartbeat it is Crashed, and its slot free."""
    return AutomationCore(
        name=ZOMBIES,
        description=f"No heartbeat for {BEAT_LIMIT_SECONDS} s: worker and process are gone, killed or without power.",
        trigger=_trigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            within=timedelta(seconds=BEAT_LIMIT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"Nothing was heard of this run for {BEAT_LIMIT_SECONDS} s: its worker and process are gone.",
            )
        ],
    )


def resume() -> AutomationCore:
    """A crash is nobody's decision and no answer, unlike a cancellation or a failure: the same run is started again."""
    message = "The run crashed and goes on from what is in the store."
    return AutomationCore(
        name=RESUME,
        description=f"Starts a crashed run again after {SETTLE_SECONDS} s; what it did is found in the store. "
        f"Failed runs are left to people.",
        trigger=_trigger(
            posture=Posture.Proactive,  # nobody has done anything about it
            after={"prefect.flow-run.Crashed"},
            expect={"prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            within=timedelta(seconds=SETTLE_SECONDS),
        ),
        actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=message)],
    )


def loop_breaker(resume_id: UUID) -> AutomationCore:
    """Runs that crash again and again are not started for ever: the automation `resume` is paused."""
    return AutomationCore(
        name=LOOP,
        description=f"{CRASHES} crashes in {CRASH_MINUTES} minutes pause the automatic restart. Mend what makes runs "
        f"crash (their logs say it), then switch it on again here.",
        trigger=_trigger(
            expect={"prefect.flow-run.Crashed"}, threshold=CRASHES, within=timedelta(minutes=CRASH_MINUTES)
        ),
        actions=[PauseAutomation(source="selected", automation_id=resume_id)],
    )


def notify(block_id: UUID) -> AutomationCore:
    """A failed or crashed run is told of through a notification block."""
    return AutomationCore(
        name=NOTIFY,
        description="Sends a message for each failed or crashed run.",
        trigger=_trigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.TimedOut", "prefect.flow-run.Crashed"},
            for_each={"prefect.resource.id"},
        ),
        actions=[
            SendNotification(
                block_document_id=block_id,
                subject="{{ flow_run.name }}: {{ flow_run.state.name }}",
                body="{{ flow_run.name }} of deployment {{ deployment.name }}: {{ flow_run.state.name }}\n"
                "{{ flow_run.state.message }}\n{{ flow_run|ui_url }}\n"
                "Retry it there, or: prefect flow-run retry {{ flow_run.id }}",
            )
        ],
    )


def _trigger(**how: Any) -> EventTrigger:
    ours = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
    return EventTrigger(match={"prefect.resource.id": "prefect.flow-run.*"}, match_related=ours, **how)

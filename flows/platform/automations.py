"""Automations of Prefect's server, for runs with our TAG: mark dead runs as crashed, restart, notify about failures."""

from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, PauseAutomation, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

TAG = "gpt2"  # of our deployments' runs, and of the runs that the console starts, which nobody restarts
OURS = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
DEPLOYED = [OURS, {"prefect.resource.id": "prefect.deployment.*", "prefect.resource.role": "deployment"}]
HEARTBEAT_LIMIT_SECONDS = 90  # three heartbeats: the deployments set PREFECT_FLOWS_HEARTBEAT_FREQUENCY to 30 s
PENDING_LIMIT_SECONDS = 300  # a process starts in seconds, on a busy host with a pull step in a minute or two
RESTART_SECONDS = 20  # a worker reports a crash twice; the second report must not hit the restarted run
MAX_CRASHES, CRASH_MINUTES = 8, 15  # only instant crashes reach this: a missing heartbeat takes 2 minutes to detect

MARK_CRASHED = "gpt2: mark runs without a heartbeat as crashed"
MARK_ORPHANED = "gpt2: mark runs that never started as crashed"
RESTART = "gpt2: restart crashed runs"
NOTIFY = "gpt2: notify about failed runs"


def mark_crashed() -> AutomationCore:
    """Mark a run without a heartbeat as Crashed, which frees its slot. A dead worker cannot report the crash."""
    return _mark_silent(MARK_CRASHED, {"heartbeat", "Running"}, HEARTBEAT_LIMIT_SECONDS, "No heartbeat for")


def mark_orphaned() -> AutomationCore:
    """Mark a run as Crashed whose worker died before its first heartbeat. Pending, it would hold its slot forever."""
    states = {"Pending", "Submitting", "InfrastructurePending"}
    return _mark_silent(MARK_ORPHANED, states, PENDING_LIMIT_SECONDS, "Not started within")


def _mark_silent(name: str, events: set[str], seconds: int, silence: str) -> AutomationCore:
    reason = f"{silence} {seconds} s: the run's worker or process died."
    return AutomationCore(
        name=name,
        description=reason,
        trigger=_silence_after(events, seconds, OURS),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=reason)],
    )


def restart() -> AutomationCore:
    """Schedule a crashed run again. Cancelled and failed runs are left alone."""
    message = "The run crashed; it is restarted and resumes from the store."
    return AutomationCore(
        name=RESTART,
        description=f"Restarts a crashed run after {RESTART_SECONDS} s; it resumes from the store. "
        f"Failed runs are left for people to retry.",
        trigger=_silence_after({"Crashed"}, RESTART_SECONDS),
        actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=message)],
    )


def pause_restarts(restart_id: UUID) -> AutomationCore:
    """Pause the automation `restart` after repeated crashes, so that no run is restarted forever."""
    return AutomationCore(
        name="gpt2: pause automatic restarts after repeated crashes",
        description=f"{MAX_CRASHES} crashes in {CRASH_MINUTES} minutes pause the automatic restart. Fix the cause of "
        f"the crashes (see the runs' logs), then enable '{RESTART}' again.",
        trigger=_trigger(
            expect={"prefect.flow-run.Crashed"}, threshold=MAX_CRASHES, within=timedelta(minutes=CRASH_MINUTES)
        ),
        actions=[PauseAutomation(source="selected", automation_id=restart_id)],
    )


def notify(block_id: UUID) -> AutomationCore:
    """Send a message for each failed or crashed run through a notification block."""
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


def _silence_after(names: set[str], seconds: int, related: Any = DEPLOYED) -> EventTrigger:
    """A trigger that fires when no other event of the run follows one of these within `seconds`."""
    return _trigger(
        related,
        posture=Posture.Proactive,
        after={f"prefect.flow-run.{name}" for name in names},
        expect={"prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        within=timedelta(seconds=seconds),
    )


def _trigger(related: Any = DEPLOYED, **options: Any) -> EventTrigger:
    return EventTrigger(match={"prefect.resource.id": "prefect.flow-run.*"}, match_related=related, **options)

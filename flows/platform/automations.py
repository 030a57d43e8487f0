"""Automations of Prefect's server, for runs with our TAG: mark dead runs as crashed, restart, notify people."""

from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, PauseAutomation, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

TAG = "gpt2"  # of our deployments' runs, and of the runs that the console starts, which nobody restarts
OURS = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
EACH_RUN = {"prefect.resource.id"}
DEPLOYED = [OURS, {"prefect.resource.id": "prefect.deployment.*", "prefect.resource.role": "deployment"}]
HEARTBEAT_LIMIT_SECONDS = 90  # three heartbeats: the deployments set PREFECT_FLOWS_HEARTBEAT_FREQUENCY to 30 s
PENDING_LIMIT_SECONDS = 300  # a process starts in seconds, on a busy host with a pull step in a minute or two
RESTART_SECONDS = 20  # a worker reports a crash twice; the second report must not hit the restarted run
MAX_CRASHES, CRASH_MINUTES = 8, 15  # only instant crashes reach this: a missing heartbeat takes 2 minutes to detect

MARK_CRASHED = "gpt2: mark runs without a heartbeat as crashed"
MARK_ORPHANED = "gpt2: mark runs that never started as crashed"
RESTART = "gpt2: restart crashed runs"
PAUSE = "gpt2: pause automatic restarts after repeated crashes"
NOTIFY = "gpt2: notify about failed runs"
NOTIFY_ALERTS = "gpt2: notify about alerts"
REACTIVE = Posture.Reactive  # the default, but the server refuses an update of an automation that leaves it out
ALERT = "gpt2.alert"  # the event of an alert during training; the payload has its run and text


def mark_crashed() -> AutomationCore:
    """Mark a run without a heartbeat as Crashed, which frees its slot. A dead worker cannot report the crash."""
    return _mark_silent(MARK_CRASHED, {"heartbeat", "Running"}, HEARTBEAT_LIMIT_SECONDS, "No heartbeat for")


def mark_orphaned() -> AutomationCore:
    """Mark a run as Crashed whose worker died before its first heartbeat. Pending, it would hold its slot forever."""
    states = {"Pending", "Submitting", "InfrastructurePending"}
    return _mark_silent(MARK_ORPHANED, states, PENDING_LIMIT_SECONDS, "Not started within")


def _mark_silent(name: str, events: set[str], seconds: int, silence: str) -> AutomationCore:
    reason = f"{silence} {seconds} s: the run's worker or process died."
    trigger = _silence_after(events, seconds, OURS)
    action = ChangeFlowRunState(state=StateType.CRASHED, message=reason)
    return AutomationCore(name=name, description=reason, trigger=trigger, actions=[action])


def restart() -> AutomationCore:
    """Schedule a crashed run again. Cancelled and failed runs are left alone."""
    message = "The run crashed; it is restarted and resumes from the store."
    description = f"Restarts a crashed run after {RESTART_SECONDS} s. Failed runs are left for people to retry."
    trigger = _silence_after({"Crashed"}, RESTART_SECONDS)
    action = ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=message)
    return AutomationCore(name=RESTART, description=description, trigger=trigger, actions=[action])


def pause_restarts(restart_id: UUID) -> AutomationCore:
    """Pause the automation `restart` after repeated crashes, so that no run is restarted forever."""
    reason = f"{MAX_CRASHES} crashes in {CRASH_MINUTES} minutes pause the automatic restart."
    remedy = f"Fix the cause of the crashes (see the runs' logs), then enable '{RESTART}' again."
    within = timedelta(minutes=CRASH_MINUTES)
    trigger = _trigger(expect={"prefect.flow-run.Crashed"}, threshold=MAX_CRASHES, within=within, posture=REACTIVE)
    action = PauseAutomation(source="selected", automation_id=restart_id)
    return AutomationCore(name=PAUSE, description=f"{reason} {remedy}", trigger=trigger, actions=[action])


def notify(block_id: UUID) -> AutomationCore:
    """Send a message for each failed or crashed run through a notification block."""
    subject = "{{ flow_run.name }}: {{ flow_run.state.name }}"
    body = "{{ flow_run.name }} of deployment {{ deployment.name }}: {{ flow_run.state.name }}\n"
    body += "{{ flow_run.state.message }}\n{{ flow_run|ui_url }}\n"
    body += "Retry it there, or: prefect flow-run retry {{ flow_run.id }}"
    action = SendNotification(block_document_id=block_id, subject=subject, body=body)
    ends = {f"prefect.flow-run.{state}" for state in ("Failed", "TimedOut", "Crashed")}
    trigger = _trigger(expect=ends, for_each=EACH_RUN, posture=REACTIVE)
    description = "Sends a message for each failed or crashed run."
    return AutomationCore(name=NOTIFY, description=description, trigger=trigger, actions=[action])


def notify_alerts(block_id: UUID) -> AutomationCore:
    """Send a message for each alert of a training through a notification block."""
    subject, body = "{{ event.payload.run }}: alert", "{{ event.payload.alert }}\n{{ flow_run|ui_url }}"
    action = SendNotification(block_document_id=block_id, subject=subject, body=body)
    trigger = EventTrigger(expect={ALERT}, posture=REACTIVE)
    return AutomationCore(name=NOTIFY_ALERTS, description="Sends each alert.", trigger=trigger, actions=[action])


def _silence_after(names: set[str], seconds: int, related: Any = DEPLOYED) -> EventTrigger:
    """A trigger that fires when no other event of the run follows one of these within `seconds`."""
    after = {f"prefect.flow-run.{name}" for name in names}
    options = {"posture": Posture.Proactive, "for_each": EACH_RUN, "within": timedelta(seconds=seconds)}
    return _trigger(related, after=after, expect={"prefect.flow-run.*"}, **options)


def _trigger(related: Any = DEPLOYED, **options: Any) -> EventTrigger:
    return EventTrigger(match={"prefect.resource.id": "prefect.flow-run.*"}, match_related=related, **options)

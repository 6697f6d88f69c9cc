package pod

import "github.com/naru-project/naru/internal/errs"

// Phase is where a pod or container is in its life, in-between phases included.
type Phase string

// The phases. A pod goes Creating → Ready → Stopping → Stopped → Removing; a
// container Creating → Created → Starting → Running → Stopping? → Exited →
// Removing. Broken keeps what an undo could not take down, for the reaper.
const (
	PhaseCreating Phase = "creating"
	PhaseReady    Phase = "ready"
	PhaseCreated  Phase = "created"
	PhaseStarting Phase = "starting"
	PhaseRunning  Phase = "running"
	PhaseStopping Phase = "stopping"
	PhaseStopped  Phase = "stopped"
	PhaseExited   Phase = "exited"
	PhaseRemoving Phase = "removing"
	PhaseBroken   Phase = "broken"
)

// happening is what moves a pod or container from one phase to the next.
type happening string

const (
	hapMade    happening = "made"    // every step of the create is done
	hapStart   happening = "start"   // StartContainer begins
	hapStarted happening = "started" // the entrypoint runs
	hapReset   happening = "reset"   // a start that a crash cut short never happened
	hapStop    happening = "stop"    // a stop begins, or begins again
	hapStopped happening = "stopped" // the pod holds nothing of the host any more
	hapExit    happening = "exit"    // the first process is gone, or never came to be
	hapLost    happening = "lost"    // the sandbox was found not to exist any more
	hapRemove  happening = "remove"  // a removal begins, or begins again
	hapBroken  happening = "broken"  // an undo or removal could not finish
)

type arrow struct {
	from Phase
	on   happening
}

var podArrows = map[arrow]Phase{
	{PhaseCreating, hapMade}:    PhaseReady,
	{PhaseCreating, hapBroken}:  PhaseBroken,
	{PhaseReady, hapStop}:       PhaseStopping,
	{PhaseReady, hapLost}:       PhaseStopped,
	{PhaseStopping, hapStop}:    PhaseStopping,
	{PhaseStopping, hapStopped}: PhaseStopped,
	{PhaseStopping, hapLost}:    PhaseStopped,
	{PhaseStopped, hapStop}:     PhaseStopped, // a lost pod is stopped in earnest: containers, leases
	{PhaseStopped, hapStopped}:  PhaseStopped,
	{PhaseStopped, hapRemove}:   PhaseRemoving,
	{PhaseRemoving, hapRemove}:  PhaseRemoving,
	{PhaseRemoving, hapBroken}:  PhaseBroken,
	{PhaseBroken, hapStop}:      PhaseBroken,
	{PhaseBroken, hapStopped}:   PhaseBroken,
	{PhaseBroken, hapRemove}:    PhaseRemoving,
	{PhaseBroken, hapBroken}:    PhaseBroken,
}

var containerArrows = map[arrow]Phase{
	{PhaseCreating, hapMade}:    PhaseCreated,
	{PhaseCreating, hapBroken}:  PhaseBroken,
	{PhaseCreated, hapStart}:    PhaseStarting,
	{PhaseCreated, hapStop}:     PhaseStopping,
	{PhaseCreated, hapExit}:     PhaseExited,
	{PhaseStarting, hapStarted}: PhaseRunning,
	{PhaseStarting, hapExit}:    PhaseExited,
	{PhaseStarting, hapReset}:   PhaseCreated,
	{PhaseRunning, hapStop}:     PhaseStopping,
	{PhaseRunning, hapExit}:     PhaseExited,
	{PhaseStopping, hapStop}:    PhaseStopping,
	{PhaseStopping, hapExit}:    PhaseExited,
	{PhaseExited, hapStop}:      PhaseExited,
	{PhaseExited, hapExit}:      PhaseExited, // seen twice, or known better later
	{PhaseExited, hapRemove}:    PhaseRemoving,
	{PhaseRemoving, hapRemove}:  PhaseRemoving,
	{PhaseRemoving, hapBroken}:  PhaseBroken,
	{PhaseBroken, hapRemove}:    PhaseRemoving,
	{PhaseBroken, hapBroken}:    PhaseBroken,
}

// nextPod and nextContainer are the whole life cycle. What is not in the
// tables cannot happen.
func nextPod(p Phase, h happening) (Phase, error) { return next("pod", podArrows, p, h) }

func nextContainer(p Phase, h happening) (Phase, error) {
	return next("container", containerArrows, p, h)
}

func next(noun string, arrows map[arrow]Phase, p Phase, h happening) (Phase, error) {
	n, ok := arrows[arrow{p, h}]
	if !ok {
		return p, errs.New(errs.FailedPrecondition, "%s is %s: %s is not possible", noun, p, h)
	}
	return n, nil
}

// known reports whether a phase read from a record is one of the noun's.
func known(arrows map[arrow]Phase, p Phase) bool {
	for a, to := range arrows {
		if a.from == p || to == p {
			return true
		}
	}
	return false
}

// stateOf is what CRI is told of a container in phase p.
func stateOf(p Phase) ContainerState {
	switch p {
	case PhaseCreating, PhaseCreated, PhaseStarting:
		return StateCreated
	case PhaseRunning, PhaseStopping:
		return StateRunning
	case PhaseExited, PhaseRemoving:
		return StateExited
	}
	return StateUnknown
}

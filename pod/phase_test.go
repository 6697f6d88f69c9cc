package pod

import (
	"strings"
	"testing"

	"github.com/naru-project/naru/internal/errs"
)

var (
	allPhases = []Phase{
		PhaseCreating, PhaseReady, PhaseCreated, PhaseStarting, PhaseRunning, PhaseStopping,
		PhaseStopped, PhaseExited, PhaseRemoving, PhaseBroken,
	}
	allHappenings = []happening{
		hapMade, hapStart, hapStarted, hapReset, hapStop, hapStopped, hapExit, hapLost, hapRemove, hapBroken,
	}
)

// The life cycle, written a second time and by hand. Every pair that is not
// here must be refused.
const podLife = `
creating made ready
creating broken broken
ready stop stopping
ready lost stopped
stopping stop stopping
stopping stopped stopped
stopping lost stopped
stopped stop stopped
stopped stopped stopped
stopped remove removing
removing remove removing
removing broken broken
broken stop broken
broken stopped broken
broken remove removing
broken broken broken`

const containerLife = `
creating made created
creating broken broken
created start starting
created stop stopping
created exit exited
starting started running
starting exit exited
starting reset created
running stop stopping
running exit exited
stopping stop stopping
stopping exit exited
exited stop exited
exited exit exited
exited remove removing
removing remove removing
removing broken broken
broken remove removing
broken broken broken`

func TestAllPairsOfPhases(t *testing.T) {
	for _, noun := range []struct {
		name string
		life string
		next func(Phase, happening) (Phase, error)
	}{{"pod", podLife, nextPod}, {"container", containerLife, nextContainer}} {
		want := make(map[arrow]Phase)
		for line := range strings.Lines(strings.TrimSpace(noun.life)) {
			f := strings.Fields(line)
			want[arrow{Phase(f[0]), happening(f[1])}] = Phase(f[2])
		}
		seen := 0
		for _, p := range allPhases {
			for _, h := range allHappenings {
				got, err := noun.next(p, h)
				to, legal := want[arrow{p, h}]
				switch {
				case legal && (err != nil || got != to):
					t.Errorf("%s %s + %s: got %s, %v; want %s", noun.name, p, h, got, err, to)
				case !legal && (!errs.Is(err, errs.FailedPrecondition) || got != p):
					t.Errorf("%s %s + %s: got %s, %v; want a refusal", noun.name, p, h, got, err)
				case legal:
					seen++
				}
			}
		}
		if seen != len(want) {
			t.Errorf("%s: %d of %d arrows were tried", noun.name, seen, len(want))
		}
	}
}

// From every phase a removal leads to the end, so that nothing stays for ever.
func TestEveryPhaseCanEnd(t *testing.T) {
	for _, noun := range []struct {
		name   string
		arrows map[arrow]Phase
	}{{"pod", podArrows}, {"container", containerArrows}} {
		for _, p := range allPhases {
			if !known(noun.arrows, p) || p == PhaseCreating { // whose record is undone
				continue
			}
			reach := map[Phase]bool{p: true}
			for range allPhases {
				for a, to := range noun.arrows {
					if reach[a.from] {
						reach[to] = true
					}
				}
			}
			if !reach[PhaseRemoving] {
				t.Errorf("%s: %s never gets removed", noun.name, p)
			}
		}
	}
}

func TestStateOf(t *testing.T) {
	for p, want := range map[Phase]ContainerState{
		PhaseCreating: StateCreated, PhaseCreated: StateCreated, PhaseStarting: StateCreated,
		PhaseRunning: StateRunning, PhaseStopping: StateRunning,
		PhaseExited: StateExited, PhaseRemoving: StateExited, PhaseBroken: StateUnknown, "": StateUnknown,
	} {
		if got := stateOf(p); got != want {
			t.Errorf("%s: %s, want %s", p, got, want)
		}
	}
}

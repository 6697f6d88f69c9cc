package keeper

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/runtime/monitor/wire"
)

// A worker may live and yet do nothing: stopped, or stuck. The keeper asks it
// for a sign of life (wire.KindBeat), seldom enough to cost nothing, and
// replaces one that gives none.
const (
	beatEvery    = 10 * time.Second
	beatPatience = 15 * time.Second
	beatVersion  = 2 // of the protocol, from which on a worker answers
	// beatLate: who looks so much too late was stopped itself, and maybe the
	// worker with it (a frozen cgroup, a paused machine). Then it gets a new chance.
	beatLate = 3 * time.Second
)

// checkWorker is called when w.beatAt is due.
func (k *keeper) checkWorker(now time.Time) {
	w := &k.worker
	late := now.Sub(w.beatAt) > beatLate
	w.beatAt = time.Time{}
	if w.pid == 0 || w.version < beatVersion {
		return
	}
	k.readSocket() // the answer may lie there
	switch {
	case w.beat == 0:
		if w.beatAt.IsZero() {
			k.beats++
			w.beat, w.beatAt = k.beats, now.Add(beatPatience)
			k.tell(wire.KindBeat, w.beat, nil, nil)
		}
	case late:
		w.beatAt = now.Add(beatPatience)
	default:
		k.logf("worker %d has not answered for %v: it is replaced", w.pid, beatPatience)
		w.signal(unix.SIGKILL)
	}
}

// beaten is the worker's answer.
func (k *keeper) beaten(n uint64) {
	if n == k.worker.beat {
		k.worker.beat, k.worker.beatAt = 0, time.Now().Add(beatEvery)
	}
}

// worked has garbage collected a while from now.
func (k *keeper) worked() {
	if k.tidyAt.IsZero() {
		k.tidyAt = time.Now().Add(tidyTime)
	}
}

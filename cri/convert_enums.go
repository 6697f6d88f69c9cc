package cri

import (
	"strconv"
	"strings"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/pod"
)

var protocols = map[criv1.Protocol]pod.Protocol{
	criv1.Protocol_TCP: pod.TCP, criv1.Protocol_UDP: pod.UDP, criv1.Protocol_SCTP: pod.SCTP,
}

var pidModes = map[criv1.NamespaceMode]pod.PIDMode{
	criv1.NamespaceMode_POD:       pod.PIDPod,
	criv1.NamespaceMode_CONTAINER: pod.PIDContainer,
	criv1.NamespaceMode_NODE:      pod.PIDNode,
	criv1.NamespaceMode_TARGET:    pod.PIDTarget,
}

// criPID is the reverse of pidModes; an unset mode is CRI's default, POD.
func criPID(m pod.PIDMode) criv1.NamespaceMode {
	for cri, p := range pidModes {
		if p == m {
			return cri
		}
	}
	return criv1.NamespaceMode_POD
}

func podOrNode(m criv1.NamespaceMode) (pod.NamespaceMode, bool) {
	switch m {
	case criv1.NamespaceMode_POD:
		return pod.ModePod, true
	case criv1.NamespaceMode_NODE:
		return pod.ModeNode, true
	}
	return "", false
}

func nodeOrPod(m pod.NamespaceMode) criv1.NamespaceMode {
	if m == pod.ModeNode {
		return criv1.NamespaceMode_NODE
	}
	return criv1.NamespaceMode_POD
}

var propagations = map[criv1.MountPropagation]pod.Propagation{
	criv1.MountPropagation_PROPAGATION_PRIVATE:           pod.PropagationPrivate,
	criv1.MountPropagation_PROPAGATION_HOST_TO_CONTAINER: pod.PropagationHostToContainer,
	criv1.MountPropagation_PROPAGATION_BIDIRECTIONAL:     pod.PropagationBidirectional,
}

func criPropagation(p pod.Propagation) criv1.MountPropagation {
	for cri, q := range propagations {
		if p == q {
			return cri
		}
	}
	return criv1.MountPropagation_PROPAGATION_PRIVATE
}

var profileTypes = map[criv1.SecurityProfile_ProfileType]pod.ProfileType{
	criv1.SecurityProfile_RuntimeDefault: pod.ProfileRuntimeDefault,
	criv1.SecurityProfile_Unconfined:     pod.ProfileUnconfined,
	criv1.SecurityProfile_Localhost:      pod.ProfileLocalhost,
}

var containerStates = map[pod.ContainerState]criv1.ContainerState{
	pod.StateCreated: criv1.ContainerState_CONTAINER_CREATED,
	pod.StateRunning: criv1.ContainerState_CONTAINER_RUNNING,
	pod.StateExited:  criv1.ContainerState_CONTAINER_EXITED,
	pod.StateUnknown: criv1.ContainerState_CONTAINER_UNKNOWN,
}

func criContainerState(s pod.ContainerState) criv1.ContainerState {
	if cri, ok := containerStates[s]; ok {
		return cri
	}
	return criv1.ContainerState_CONTAINER_UNKNOWN
}

var eventTypes = map[pod.EventType]criv1.ContainerEventType{
	pod.EventCreated: criv1.ContainerEventType_CONTAINER_CREATED_EVENT,
	pod.EventStarted: criv1.ContainerEventType_CONTAINER_STARTED_EVENT,
	pod.EventStopped: criv1.ContainerEventType_CONTAINER_STOPPED_EVENT,
	pod.EventDeleted: criv1.ContainerEventType_CONTAINER_DELETED_EVENT,
}

// signalName makes "SIGRTMIN+3" of CRI's SIGNAL_SIGRTMINPLUS3; the default
// signal has no name.
func signalName(field string, s criv1.Signal) (string, error) {
	if s == criv1.Signal_SIGNAL_RUNTIME_DEFAULT {
		return "", nil
	}
	name, ok := criv1.Signal_name[int32(s)]
	if !ok {
		return "", invalid("%s %d is not a signal of CRI", field, s)
	}
	name = strings.TrimPrefix(name, "SIGNAL_")
	name = strings.Replace(name, "RTMINPLUS", "RTMIN+", 1)
	return strings.Replace(name, "RTMAXMINUS", "RTMAX-", 1), nil
}

// linuxSignals are the standard signals by number from 1 (signal(7)).
var linuxSignals = strings.Fields(`HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM
	STKFLT CHLD CONT STOP TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS`)

// criSignal finds CRI's value of an effective stop signal, however an image
// spelled it: SIGTERM, TERM, 15, SIGRTMIN+3, 37. Unknown ones give the default.
func criSignal(name string) criv1.Signal {
	name = strings.TrimPrefix(strings.ToUpper(strings.TrimSpace(name)), "SIG")
	if n, err := strconv.Atoi(name); err == nil {
		name = signalOfNumber(n)
	}
	name = strings.Replace(name, "RTMIN+", "RTMINPLUS", 1)
	name = strings.Replace(name, "RTMAX-", "RTMAXMINUS", 1)
	return criv1.Signal(criv1.Signal_value["SIGNAL_SIG"+name]) // absent = 0 = default
}

// signalOfNumber names a signal by number. The C library keeps 32 and 33 for
// itself: SIGRTMIN is 34, SIGRTMAX 64.
func signalOfNumber(n int) string {
	const rtMin, rtMax = 34, 64
	switch {
	case n >= 1 && n <= len(linuxSignals):
		return linuxSignals[n-1]
	case n == rtMin:
		return "RTMIN"
	case n == rtMax:
		return "RTMAX"
	case n > rtMin && n <= rtMin+15:
		return "RTMIN+" + strconv.Itoa(n-rtMin)
	case n > rtMin+15 && n < rtMax:
		return "RTMAX-" + strconv.Itoa(rtMax-n)
	}
	return ""
}

// nanos is CRI's form of a time; zero means "not specified".
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

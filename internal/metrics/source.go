package metrics

import "time"

// Source tells what there is. It answers from memory, but for MonitorUp, which
// has a deadline of its own.
type Source interface {
	Pods() map[string]int       // by phase
	Containers() map[string]int // by phase
	Operations() map[Place]Running
	Findings() map[string]int
	Images() Images
	Addresses() map[string]Addresses // by family: ipv4, ipv6
	NetworkReady() bool
	MonitorUp() bool
	MonitorRestarts() uint64
}

// Place is a step of a kind of operation.
type Place struct{ Operation, Step string }

// Running are the operations in one place.
type Running struct {
	Count  int
	Oldest time.Duration // in this step
}

// Images of the node.
type Images struct {
	Count, Pulls  int
	Bytes, Inodes uint64 // of all layers
}

// Addresses of one family. An IPv6 range has more than an integer holds.
type Addresses struct{ Used, Free float64 }

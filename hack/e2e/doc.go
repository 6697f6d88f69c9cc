// Package e2e is what the runs with a real kubelet share: a node of naru and a
// kubelet, daemons that are looked after, a page of results, and the judgement of
// what the kubelet has logged. The scripts in hack/ make the place a node runs in.
package e2e

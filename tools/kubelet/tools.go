//go:build tools

// Package tools pins the kubelet that "make kubelet-smoke" builds; see the
// Makefile.
package tools

import _ "k8s.io/kubernetes/cmd/kubelet"

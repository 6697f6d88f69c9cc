//go:build tools

// Package tools pins the etcd that "make k8s-tools" builds; see the Makefile.
package tools

import _ "go.etcd.io/etcd/server/v3"

//go:build tools

// Package tools pins the versions of the CRI tools that the test scripts
// build; see the Makefile.
package tools

import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "sigs.k8s.io/cri-tools/cmd/crictl"
)

//go:build tools

// Package tools pins the linter that "make lint" builds; see the Makefile.
package tools

import _ "github.com/golangci/golangci-lint/v2/cmd/golangci-lint"

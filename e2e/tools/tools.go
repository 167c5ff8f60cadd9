//go:build tools

// Package tools pins the CRI's tools that the end-to-end tests run. It is a module of its own, so
// that what they need stays out of Caisson's.
package tools

import (
	_ "github.com/onsi/gomega"
	_ "sigs.k8s.io/cri-tools/pkg/benchmark"
	_ "sigs.k8s.io/cri-tools/pkg/common"
	_ "sigs.k8s.io/cri-tools/pkg/framework"
	_ "sigs.k8s.io/cri-tools/pkg/validate"
)

package testhost

import (
	"testing"
	"time"
)

func TestLimit(t *testing.T) {
	for env, want := range map[string]time.Duration{"": 2, "10": 20, "1": 2, "0": 2, "-3": 2, "fast": 2} {
		t.Setenv("NARU_SLOW", env)
		if got := Limit(2); got != want {
			t.Errorf("NARU_SLOW=%q: %v, want %v", env, got, want)
		}
	}
}

package cri

import (
	"path/filepath"
	"regexp"
	"strings"
)

// requireID checks an ID that must be there.
func requireID(field, id string) error {
	if id == "" {
		return invalid("%s is empty", field)
	}
	return checkText(field, id)
}

// checkText refuses what no path, argument or name may hold.
func checkText(field, s string) error {
	if strings.ContainsRune(s, 0) {
		return invalid("%s holds a zero byte", field)
	}
	return nil
}

// checkLine refuses what would start a new line in a file that is written
// line by line (hosts, resolv.conf, hostname).
func checkLine(field, s string) error {
	if strings.ContainsAny(s, "\n\r\x00") {
		return invalid("%s holds a line end or a zero byte", field)
	}
	return nil
}

func checkLines(field string, list []string) error {
	for _, s := range list {
		if err := checkLine(field, s); err != nil {
			return err
		}
	}
	return nil
}

func checkTexts(field string, list []string) error {
	for _, s := range list {
		if err := checkText(field, s); err != nil {
			return err
		}
	}
	return nil
}

// checkAbs checks an absolute path without "..".
func checkAbs(field, path string) error {
	switch {
	case path == "":
		return invalid("%s is empty", field)
	case !filepath.IsAbs(path):
		return invalid("%s %q is not an absolute path", field, path)
	case hasDotDot(path):
		return invalid("%s %q climbs with ..", field, path)
	}
	return checkText(field, path)
}

// checkLocal checks a relative path that stays below where it starts.
func checkLocal(field, path string) error {
	if !filepath.IsLocal(path) {
		return invalid("%s %q is not a relative path that stays inside", field, path)
	}
	return checkText(field, path)
}

func hasDotDot(path string) bool {
	for part := range strings.SplitSeq(path, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

// checkUID checks a user or group ID. The highest number means "no change" to
// chown(2) and setresuid(2), so it is nobody's.
func checkUID(field string, v int64) error {
	if v < 0 || v >= 1<<32-1 {
		return invalid("%s %d is not between 0 and 4294967294", field, v)
	}
	return nil
}

// checkRange checks min <= v <= max.
func checkRange(field string, v, least, most int64) error {
	if v < least || v > most {
		return invalid("%s %d is not between %d and %d", field, v, least, most)
	}
	return nil
}

var (
	// pageSizePattern is how cgroup files name huge page sizes (hugetlb.2MB.max).
	pageSizePattern = regexp.MustCompile(`^[1-9][0-9]*[KMG]B$`)
	// cpuListPattern is the list format of cpuset(7).
	cpuListPattern = regexp.MustCompile(`^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$`)
	// unifiedPattern is a file name of a cgroup controller.
	unifiedPattern = regexp.MustCompile(`^[a-z0-9_]+(\.[A-Za-z0-9_]+)+$`)
	// sysctlPattern is a name of sysctl(8), with dots or slashes.
	sysctlPattern = regexp.MustCompile(`^[A-Za-z0-9_-]+([./][A-Za-z0-9_-]+)+$`)
)

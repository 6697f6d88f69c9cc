package pod

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// terminationPathAnnotation is set by kubelet on every container and holds the
// container path of the termination message (pkg/kubelet/kuberuntime/labels.go).
// kubelet invents a new host file for it on every try, so that two tries of
// one create always differ there; it reads the file's name back from the
// status of the container that it got.
const terminationPathAnnotation = "io.kubernetes.container.terminationMessagePath"

// comparable forms: what kubelet collects from maps, in no order, is sorted.

func comparableContainer(c *ContainerConfig) *ContainerConfig {
	n := *c
	n.Env = sortedBy(c.Env, func(e string) string { k, _, _ := strings.Cut(e, "="); return k })
	n.Devices = sortedBy(c.Devices, func(d Device) string { return d.ContainerPath + "\x00" + d.HostPath })
	n.CDIDevices = sortedBy(c.CDIDevices, func(s string) string { return s })
	n.Security.SupplementalGroups = sortedBy(c.Security.SupplementalGroups, func(g int64) int64 { return g })
	n.Resources.Hugepages = sortedBy(c.Resources.Hugepages, func(h HugepageLimit) string { return h.PageSize })
	if path := c.Annotations[terminationPathAnnotation]; path != "" {
		n.Mounts = slices.Clone(c.Mounts)
		for i := range n.Mounts {
			if n.Mounts[i].ContainerPath == path {
				n.Mounts[i].HostPath = ""
			}
		}
	}
	return &n
}

func comparableSandbox(c *SandboxConfig) *SandboxConfig {
	n := *c
	n.Security.SupplementalGroups = sortedBy(c.Security.SupplementalGroups, func(g int64) int64 { return g })
	for _, r := range []**Resources{&n.Overhead, &n.Resources} {
		if *r != nil {
			sorted := **r
			sorted.Hugepages = sortedBy(sorted.Hugepages, func(h HugepageLimit) string { return h.PageSize })
			*r = &sorted
		}
	}
	return &n
}

func sortedBy[T any, K cmp.Ordered](s []T, key func(T) K) []T {
	s = slices.Clone(s)
	slices.SortStableFunc(s, func(a, b T) int { return cmp.Compare(key(a), key(b)) })
	return s
}

// firstDifference compares two configs and names the first field that differs,
// or returns "". It never shows values: they may be secrets.
func firstDifference(a, b any) string {
	switch x := a.(type) {
	case *ContainerConfig:
		if y, ok := b.(*ContainerConfig); ok {
			return strings.TrimPrefix(difference("", reflect.ValueOf(*comparableContainer(x)), reflect.ValueOf(*comparableContainer(y))), ".")
		}
	case *SandboxConfig:
		if y, ok := b.(*SandboxConfig); ok {
			return strings.TrimPrefix(difference("", reflect.ValueOf(*comparableSandbox(x)), reflect.ValueOf(*comparableSandbox(y))), ".")
		}
	}
	return "kind"
}

// difference treats empty and absent alike, as a record on disk does.
func difference(path string, a, b reflect.Value) string {
	switch a.Kind() {
	case reflect.Pointer:
		if a.IsNil() || b.IsNil() {
			return differs(path, a.IsNil() == b.IsNil())
		}
		return difference(path, a.Elem(), b.Elem())
	case reflect.Struct:
		if m := a.MethodByName("Compare"); m.IsValid() { // netip.Addr, which has no exported fields
			return differs(path, a.Interface() == b.Interface())
		}
		for i := range a.NumField() {
			if d := difference(path+"."+fieldName(a.Type().Field(i)), a.Field(i), b.Field(i)); d != "" {
				return d
			}
		}
		return ""
	case reflect.Slice:
		if a.Len() != b.Len() {
			return path
		}
		for i := range a.Len() {
			if d := difference(fmt.Sprintf("%s[%d]", path, i), a.Index(i), b.Index(i)); d != "" {
				return d
			}
		}
		return ""
	case reflect.Map:
		return mapDifference(path, a, b)
	}
	return differs(path, a.Interface() == b.Interface())
}

func mapDifference(path string, a, b reflect.Value) string {
	var keys []string
	for _, m := range []reflect.Value{a, b} {
		for _, k := range m.MapKeys() {
			keys = append(keys, k.String())
		}
	}
	slices.Sort(keys)
	for _, k := range slices.Compact(keys) {
		x, y := a.MapIndex(reflect.ValueOf(k)), b.MapIndex(reflect.ValueOf(k))
		if !x.IsValid() || !y.IsValid() || difference("value", x, y) != "" {
			return fmt.Sprintf("%s[%q]", path, k)
		}
	}
	return ""
}

func differs(path string, same bool) string {
	if same {
		return ""
	}
	return path
}

func fieldName(f reflect.StructField) string {
	if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
		return name
	}
	return strings.ToLower(f.Name)
}

// Package namespaces holds the words that sandbox and runtime share about
// Linux namespaces, as plain data.
package namespaces

import "os"

// IDMap maps Size ids from ContainerID on to those from HostID on
// (user_namespaces(7)).
type IDMap struct {
	ContainerID uint32 `json:"container_id"`
	HostID      uint32 `json:"host_id"`
	Size        uint32 `json:"size"`
}

// Paths are a pod's pinned namespaces (nsfs bind mounts). An empty path means
// the host's namespace for Net, IPC and UTS, and "none" for User and PID.
type Paths struct {
	Net  string `json:"net,omitempty"`
	IPC  string `json:"ipc,omitempty"`
	UTS  string `json:"uts,omitempty"`
	User string `json:"user,omitempty"`
	PID  string `json:"pid,omitempty"` // the pod's shared PID namespace, if it has one
}

// Request asks for new namespaces made by a helper child of the monitor. It is
// needed for user namespaces, which a Go thread cannot make (setns and unshare
// answer EINVAL in a process with threads), and for a PID namespace with a
// living init.
type Request struct {
	ID             string // of the sandbox
	User           bool   // with the two maps; Net, IPC, UTS are then owned by it
	Net, IPC, UTS  bool
	PID            bool // also start the pod's tiny init in a new PID namespace; it lives until Release
	UIDMap, GIDMap []IDMap
	ShmSize        int64 // > 0: also a tmpfs of so many bytes, made inside the user namespace, for /dev/shm
}

// Files are open namespaces (nsfs files) and, where asked for, a detached
// tmpfs mount. The caller closes them.
type Files struct {
	User, Net, IPC, UTS, PID, Shm *os.File
}

// Close closes all files.
func (f *Files) Close() {
	for _, x := range []*os.File{f.User, f.Net, f.IPC, f.UTS, f.PID, f.Shm} {
		if x != nil {
			_ = x.Close()
		}
	}
}

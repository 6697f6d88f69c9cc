package sys

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// OnThread runs fn on a NamespaceThread with its own root, working directory
// and umask (unshare(CLONE_FS)), so that fn may join mount namespaces as well.
func OnThread(fn func() error) error {
	return NamespaceThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare the thread's file system context: %w", err)
		}
		return fn()
	})
}

// PrivateMounts runs fn on a thread in a mount namespace of its own, with all
// propagation off. What fn mounts vanishes with the thread, but for what is
// still held open by a descriptor.
func PrivateMounts(fn func() error) error {
	return OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare the mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make all mounts private: %w", err)
		}
		return fn()
	})
}

// ActAs makes the calling thread create files as uid and gid, and keeps its
// capabilities for doing so (setfsuid(2) takes those of file access away). For
// use in OnThread only: the thread is not made whole again.
func ActAs(uid, gid int) error {
	if _, err := unix.SetfsgidRetGid(gid); err != nil {
		return fmt.Errorf("setfsgid %d: %w", gid, err)
	}
	if _, err := unix.SetfsuidRetUid(uid); err != nil {
		return fmt.Errorf("setfsuid %d: %w", uid, err)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	for i := range data {
		data[i].Effective = data[i].Permitted
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

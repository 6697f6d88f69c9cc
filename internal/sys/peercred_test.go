package sys

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestPeerCredentials(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	got, err := PeerCredentials(server.(*net.UnixConn))
	if err != nil {
		t.Fatal(err)
	}
	if int(got.PID) != os.Getpid() || int(got.UID) != os.Getuid() || int(got.GID) != os.Getgid() {
		t.Errorf("got %+v, want pid %d uid %d gid %d", got, os.Getpid(), os.Getuid(), os.Getgid())
	}
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Groups) != len(groups) {
		t.Errorf("got groups %v, want %v", got.Groups, groups)
	}
}

func TestPeerCredentialsClosed(t *testing.T) {
	a, b, err := socketpair(t)
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	a.Close()
	if _, err := PeerCredentials(a); err == nil {
		t.Error("no error for a closed socket")
	}
}

func socketpair(t *testing.T) (*net.UnixConn, *net.UnixConn, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	a, err := net.Dial("unix", path)
	if err != nil {
		return nil, nil, err
	}
	b, err := l.Accept()
	if err != nil {
		return nil, nil, err
	}
	return a.(*net.UnixConn), b.(*net.UnixConn), nil
}

func TestPeerHungUp(t *testing.T) {
	a, b, err := socketpair(t)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if PeerHungUp(a) {
		t.Error("hung up while open")
	}
	if _, err := b.Write([]byte("unread")); err != nil {
		t.Fatal(err)
	}
	if PeerHungUp(a) {
		t.Error("hung up while open with unread bytes")
	}
	_ = b.Close()
	if !PeerHungUp(a) {
		t.Error("not hung up after close")
	}
	_ = a.Close()
	if !PeerHungUp(a) {
		t.Error("not hung up though closed here")
	}
}

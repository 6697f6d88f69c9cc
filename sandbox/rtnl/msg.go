// Package rtnl speaks rtnetlink(7) for the few things a pod's network needs:
// a veth pair, addresses, routes, permanent neighbours, counters.
//
// Requests are put together into one batch and sent with one system call, with
// one acknowledgement for all: the RTNL lock of the kernel, which every change
// of every network on the host takes, is held shortly, and a pod's network is
// two or three system calls.
//
// Concurrency: a Batch and a Conn belong to one goroutine at a time. A Conn
// stays in the network namespace of the thread that opened it.
package rtnl

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

var native = binary.NativeEndian

// Batch is a list of requests, answered as one.
type Batch struct {
	buf   []byte
	start int // of the message that is being written
	ops   []op
}

type op struct {
	name  string
	allow []unix.Errno // results that count as done
}

// begin starts a message; name is for errors.
func (b *Batch) begin(name string, typ, flags uint16, allow ...unix.Errno) {
	b.align()
	b.start = len(b.buf)
	b.ops = append(b.ops, op{name, allow})
	b.buf = append(b.buf, make([]byte, unix.SizeofNlMsghdr)...)
	h := b.buf[b.start:]
	native.PutUint16(h[4:], typ)
	native.PutUint16(h[6:], flags|unix.NLM_F_REQUEST)
}

// end notes the length of the message.
func (b *Batch) end() {
	native.PutUint32(b.buf[b.start:], uint32(len(b.buf)-b.start))
}

func (b *Batch) align() {
	for len(b.buf)%unix.NLMSG_ALIGNTO != 0 {
		b.buf = append(b.buf, 0)
	}
}

func (b *Batch) raw(data ...byte) { b.buf = append(b.buf, data...) }

func (b *Batch) u16(v uint16) { b.buf = native.AppendUint16(b.buf, v) }

func (b *Batch) u32(v uint32) { b.buf = native.AppendUint32(b.buf, v) }

// attr appends one attribute (struct rtattr).
func (b *Batch) attr(typ uint16, data []byte) {
	b.align()
	b.u16(uint16(unix.SizeofRtAttr + len(data)))
	b.u16(typ)
	b.raw(data...)
	b.align()
}

func (b *Batch) attrU32(typ uint16, v uint32) { b.attr(typ, native.AppendUint32(nil, v)) }

func (b *Batch) attrString(typ uint16, s string) { b.attr(typ, append([]byte(s), 0)) }

func (b *Batch) attrAddr(typ uint16, a netip.Addr) { b.attr(typ, a.AsSlice()) }

// nest starts an attribute that holds others; the result is called at its end.
func (b *Batch) nest(typ uint16) (end func()) {
	b.align()
	at := len(b.buf)
	b.u16(0)
	b.u16(typ | unix.NLA_F_NESTED)
	return func() { native.PutUint16(b.buf[at:], uint16(len(b.buf)-at)) }
}

// link appends struct ifinfomsg.
func (b *Batch) link(index int, flags, change uint32) {
	b.raw(unix.AF_UNSPEC, 0)
	b.u16(0)
	b.u32(uint32(index))
	b.u32(flags)
	b.u32(change)
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// attributes calls fn for each attribute in data, until fn says no or data is
// not well formed.
func attributes(data []byte, fn func(typ uint16, value []byte) bool) {
	for len(data) >= unix.SizeofRtAttr {
		n := int(native.Uint16(data))
		if n < unix.SizeofRtAttr || n > len(data) {
			return
		}
		if !fn(native.Uint16(data[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), data[unix.SizeofRtAttr:n]) {
			return
		}
		data = data[min((n+3)&^3, len(data)):]
	}
}

// message is one part of an answer.
type message struct {
	typ, flags uint16
	seq        uint32
	data       []byte // behind the header
}

// messages splits what one recvmsg returned.
func messages(buf []byte) []message {
	var out []message
	for len(buf) >= unix.SizeofNlMsghdr {
		n := int(native.Uint32(buf))
		if n < unix.SizeofNlMsghdr || n > len(buf) {
			break
		}
		out = append(out, message{native.Uint16(buf[4:]), native.Uint16(buf[6:]), native.Uint32(buf[8:]), buf[unix.SizeofNlMsghdr:n]})
		buf = buf[min((n+3)&^3, len(buf)):]
	}
	return out
}

func cString(b []byte) string {
	if i := slices.Index(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

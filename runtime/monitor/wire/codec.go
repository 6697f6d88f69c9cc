// Package wire is how daemon, keeper and worker speak to each other: one
// hand-written, bounds-checked codec, messages of one seqpacket each, and file
// descriptors beside them (SCM_RIGHTS, unix(7)).
//
// A message is a header (kind, number of the request) and a body of fixed
// fields in little-endian order; strings and byte slices carry their length.
// A decoder ignores bytes behind the fields that it knows, so that a later
// version may append fields. The bytes may come from a peer that is older,
// newer or broken: every decoder refuses what does not fit, none allocates
// more than the message is long.
//
// It must not know what the messages are good for, and imports nothing heavy:
// it is part of naru-monitor.
package wire

import (
	"encoding/binary"
	"errors"
)

// Limits of one message. A seqpacket must fit the socket's send buffer
// (SO_SNDBUF, 208 KiB by default), SCM_MAX_FD is 253 (unix(7)).
const (
	MaxMessage = 64 << 10
	MaxFDs     = 253
	headerSize = 12
)

// ErrMalformed is returned for a message that cannot be decoded.
var ErrMalformed = errors.New("malformed message")

// Encoder appends fields to B.
type Encoder struct{ B []byte }

// U8 appends one byte.
func (e *Encoder) U8(v uint8) { e.B = append(e.B, v) }

// U16 appends two bytes.
func (e *Encoder) U16(v uint16) { e.B = binary.LittleEndian.AppendUint16(e.B, v) }

// U32 appends four bytes.
func (e *Encoder) U32(v uint32) { e.B = binary.LittleEndian.AppendUint32(e.B, v) }

// U64 appends eight bytes.
func (e *Encoder) U64(v uint64) { e.B = binary.LittleEndian.AppendUint64(e.B, v) }

// I64 appends eight bytes.
func (e *Encoder) I64(v int64) { e.U64(uint64(v)) }

// Int appends an int as four bytes; it must fit.
func (e *Encoder) Int(v int) { e.U32(uint32(int32(v))) }

// Bool appends one byte.
func (e *Encoder) Bool(v bool) {
	if v {
		e.U8(1)
		return
	}
	e.U8(0)
}

// String appends a length and the bytes of s.
func (e *Encoder) String(s string) {
	e.U32(uint32(len(s)))
	e.B = append(e.B, s...)
}

// Bytes appends a length and p.
func (e *Encoder) Bytes(p []byte) {
	e.U32(uint32(len(p)))
	e.B = append(e.B, p...)
}

// Decoder takes fields from B. After the first field that is not there every
// further one is zero, and Err tells.
type Decoder struct {
	B   []byte
	err error
}

// Err returns ErrMalformed if a field was missing or wrong.
func (d *Decoder) Err() error { return d.err }

// Fail marks the message as malformed.
func (d *Decoder) Fail() { d.err = ErrMalformed }

func (d *Decoder) take(n int) []byte {
	if d.err != nil || n < 0 || n > len(d.B) {
		d.err = ErrMalformed
		return nil
	}
	p := d.B[:n:n]
	d.B = d.B[n:]
	return p
}

// U8 takes one byte.
func (d *Decoder) U8() uint8 {
	if p := d.take(1); p != nil {
		return p[0]
	}
	return 0
}

// U16 takes two bytes.
func (d *Decoder) U16() uint16 {
	if p := d.take(2); p != nil {
		return binary.LittleEndian.Uint16(p)
	}
	return 0
}

// U32 takes four bytes.
func (d *Decoder) U32() uint32 {
	if p := d.take(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

// U64 takes eight bytes.
func (d *Decoder) U64() uint64 {
	if p := d.take(8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

// I64 takes eight bytes.
func (d *Decoder) I64() int64 { return int64(d.U64()) }

// Int takes four bytes as a signed number.
func (d *Decoder) Int() int { return int(int32(d.U32())) }

// Bool takes one byte; anything but 0 and 1 is malformed.
func (d *Decoder) Bool() bool {
	switch d.U8() {
	case 0:
		return false
	case 1:
		return true
	}
	d.Fail()
	return false
}

// Bytes takes a length and so many bytes. The result aliases the message.
func (d *Decoder) Bytes() []byte {
	n := d.U32()
	if uint64(n) > uint64(len(d.B)) {
		d.Fail()
		return nil
	}
	return d.take(int(n))
}

// String takes a length and so many bytes.
func (d *Decoder) String() string { return string(d.Bytes()) }

// Header starts every message.
type Header struct {
	Kind Kind
	Req  uint64 // number of the request; an answer and an exec's end carry that of the request
}

// Body is what follows a header.
type Body interface {
	encode(*Encoder)
	decode(*Decoder)
}

// Marshal encodes a message. body may be nil.
func Marshal(kind Kind, req uint64, body Body) []byte {
	e := Encoder{B: make([]byte, 0, 128)}
	e.U16(uint16(kind))
	e.U16(0)
	e.U64(req)
	if body != nil {
		body.encode(&e)
	}
	return e.B
}

// ParseHeader splits a message.
func ParseHeader(msg []byte) (Header, []byte, error) {
	if len(msg) < headerSize {
		return Header{}, nil, ErrMalformed
	}
	return Header{
		Kind: Kind(binary.LittleEndian.Uint16(msg)),
		Req:  binary.LittleEndian.Uint64(msg[4:]),
	}, msg[headerSize:], nil
}

// Unmarshal decodes the body of a message.
func Unmarshal(p []byte, body Body) error {
	d := Decoder{B: p}
	body.decode(&d)
	return d.Err()
}

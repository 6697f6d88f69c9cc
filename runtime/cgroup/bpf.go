package cgroup

import (
	"bytes"
	"encoding/binary"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// insn is one eBPF instruction (struct bpf_insn, linux/bpf.h).
type insn struct {
	code uint8
	regs uint8 // destination in the low, source in the high four bits
	off  int16
	imm  int32
}

// The opcodes used here (Documentation/bpf/standardization/instruction-set.rst).
const (
	opLoadWord = unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W
	opMovReg   = unix.BPF_ALU | unix.BPF_MOV | unix.BPF_X
	opMovImm   = unix.BPF_ALU | unix.BPF_MOV | unix.BPF_K
	opAndImm   = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	opShrImm   = unix.BPF_ALU | unix.BPF_RSH | unix.BPF_K
	opJeqImm   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	opJneImm   = unix.BPF_JMP | unix.BPF_JNE | unix.BPF_K
	opExit     = unix.BPF_JMP | unix.BPF_EXIT
)

// program compiles the policy for BPF_PROG_TYPE_CGROUP_DEVICE. Its context is
// struct bpf_cgroup_dev_ctx {u32 access_type; u32 major; u32 minor}, with the
// type in the low half of access_type and the access in the high half; 1
// admits.
//
// The library's own filter is not used: it admits a request as soon as one of
// its accesses is in a rule, so that a rule "r" would let a read-write open
// through.
func (p *devicePolicy) program() []insn {
	const ctx, kind, access, major, minor, tmp = 1, 2, 3, 4, 5, 1
	prog := []insn{
		{code: opLoadWord, regs: kind | ctx<<4, off: 0},
		{code: opMovReg, regs: access | kind<<4},
		{code: opAndImm, regs: kind, imm: 0xffff},
		{code: opShrImm, regs: access, imm: 16},
		{code: opLoadWord, regs: major | ctx<<4, off: 4},
		{code: opLoadWord, regs: minor | ctx<<4, off: 8}, // from here on r1 is free
	}
	for _, r := range p.rules {
		var block []insn
		devKind := int32(unix.BPF_DEVCG_DEV_CHAR)
		if r.kind == 'b' {
			devKind = unix.BPF_DEVCG_DEV_BLOCK
		}
		block = append(block, insn{code: opJneImm, regs: kind, imm: devKind})
		if r.major != anyNumber {
			block = append(block, insn{code: opJneImm, regs: major, imm: int32(r.major)})
		}
		if r.minor != anyNumber {
			block = append(block, insn{code: opJneImm, regs: minor, imm: int32(r.minor)})
		}
		block = append(block, accessTest(r.access, p.allow, access, tmp)...)
		verdict := int32(1)
		if p.allow {
			verdict = 0
		}
		block = append(block, insn{code: opMovImm, regs: 0, imm: verdict}, insn{code: opExit})
		for i := range block {
			if block[i].code == opJneImm || block[i].code == opJeqImm {
				block[i].off = int16(len(block) - i - 1) // to the next rule
			}
		}
		prog = append(prog, block...)
	}
	verdict := int32(0)
	if p.allow {
		verdict = 1
	}
	return append(prog, insn{code: opMovImm, regs: 0, imm: verdict}, insn{code: opExit})
}

// accessTest goes on to the next rule unless the request is covered (default
// deny) or touched (default allow) by acc.
func accessTest(acc int, defaultAllow bool, access, tmp uint8) []insn {
	if acc == accAll {
		return nil
	}
	t := []insn{{code: opMovReg, regs: tmp | access<<4}}
	if defaultAllow {
		return append(t, insn{code: opAndImm, regs: tmp, imm: int32(acc)}, insn{code: opJeqImm, regs: tmp})
	}
	return append(t, insn{code: opAndImm, regs: tmp, imm: int32(accAll &^ acc)}, insn{code: opJneImm, regs: tmp})
}

// bpfLicense is not on a stack, which could move under the kernel's pointer.
var bpfLicense = [...]byte{'A', 'p', 'a', 'c', 'h', 'e', '-', '2', '.', '0', 0}

// The two forms of union bpf_attr used, with the sizes that kernel 5.14 knows.
type progLoadAttr struct {
	progType, insnCount    uint32
	insns, license         uint64
	logLevel, logSize      uint32
	logBuf                 uint64
	kernVersion, progFlags uint32
	progName               [16]byte
}

type progAttachAttr struct {
	targetFd, attachFd, attachType, attachFlags uint32
}

// attachDevices loads the policy and attaches it to the group whose folder is
// dir. It stays with the group until that is removed; BPF_F_ALLOW_MULTI lets
// it live beside systemd's own, and all of them must admit a request.
func attachDevices(dir int, p *devicePolicy) error {
	if p.unrestricted() {
		return nil
	}
	var code bytes.Buffer
	for _, i := range p.program() {
		_ = binary.Write(&code, binary.NativeEndian, i) // a bytes.Buffer does not fail
	}
	insns := code.Bytes()
	load := progLoadAttr{
		progType:  unix.BPF_PROG_TYPE_CGROUP_DEVICE,
		insnCount: uint32(len(insns) / 8),
		insns:     uint64(uintptr(unsafe.Pointer(&insns[0]))),
		license:   uint64(uintptr(unsafe.Pointer(&bpfLicense[0]))),
	}
	copy(load.progName[:], "naru_devices")
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&load), unsafe.Sizeof(load))
	runtime.KeepAlive(insns)
	if err != nil {
		return classify(err, "load the device filter")
	}
	defer unix.Close(int(fd))
	attach := progAttachAttr{
		targetFd:    uint32(dir),
		attachFd:    uint32(fd),
		attachType:  unix.BPF_CGROUP_DEVICE,
		attachFlags: unix.BPF_F_ALLOW_MULTI,
	}
	if _, err := bpf(unix.BPF_PROG_ATTACH, unsafe.Pointer(&attach), unsafe.Sizeof(attach)); err != nil {
		return classify(err, "attach the device filter")
	}
	return nil
}

func bpf(cmd int, attr unsafe.Pointer, size uintptr) (uintptr, error) {
	for {
		fd, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
		switch errno {
		case 0:
			return fd, nil
		case unix.EINTR, unix.EAGAIN: // EAGAIN: the verifier saw a signal
			continue
		}
		return 0, errno
	}
}

package wire

import "github.com/naru-project/naru/internal/errs"

// Versions of the three things that can meet in different releases.
const (
	ClientMin = 1 // daemon ↔ worker
	ClientMax = 3 // 2: KindTake, Exec.Term; 3: KindJournal, KindJournalFields
	KeeperMin = 1 // keeper ↔ worker
	KeeperMax = 2 // 2: KindBeat is answered
	TableMin  = 1 // what a keeper leaves to the next one
	TableMax  = 1
)

// Kind of a message.
type Kind uint16

// Requests of the daemon, answers and events of the worker.
const (
	KindHello Kind = iota + 1
	KindPing
	KindCreate
	KindStart
	KindExec
	KindAttach
	KindFiles
	KindSetLog
	KindCloseStdin
	KindDelete
	KindList
	KindSubscribe
	KindUpgrade       // a new program for the keeper, as a file or from its own path
	KindRestartWorker // the worker ends after its answer, the keeper starts the next one
	KindBinary        // the sealed memfd
	KindHandover      // a new keeper asks the worker of a dead one for everything
	KindReply
	KindExit     // event: a container ended
	KindExecExit // event: an exec ended; Req is that of the exec
	KindTake     // a process that another program made for the keeper
	KindJournal  // how it goes with the journal; with a file, a socket connected to it
	KindJournalFields
)

// Between keeper and worker.
const (
	KindBegin      Kind = iota + 64 // a clone is about to happen: reap no unknown child
	KindEnd                         // it came to nothing
	KindPut                         // it happened: this is the container
	KindStarted                     // status pipe and gate are no longer needed
	KindSetFD                       // replace one kept file
	KindDropFD                      // close one kept file
	KindForget                      // drop a container that has ended
	KindReplace                     // replace the keeper's program
	KindEntry                       // a container, from the keeper (or the old worker) with its files
	KindEntriesEnd                  // that was the last one
	KindAck                         // answer of the keeper to a numbered message
	KindWorkerUp                    // the worker serves
	KindRestart                     // the worker asks to be replaced
	KindListener                    // handover: the listening socket
	KindBeat                        // the keeper asks for a sign of life; the worker sends the same back
)

// The files kept for a container, in the order in which they travel.
const (
	FDPid = iota
	FDStatus
	FDGate
	FDStdin
	FDStdout
	FDStderr
	FDPty
	FDDevpts
	FDLog
	FDStage0 // staging pipe of stdout (or the terminal), open for both directions
	FDStage1 // staging pipe of stderr
	FDState  // memfd of the log copier
	NumFDs
)

// FDs are kept files by the indices above; -1 = not there.
type FDs [NumFDs]int

// NoFDs returns a set without files.
func NoFDs() FDs {
	var f FDs
	for i := range f {
		f[i] = -1
	}
	return f
}

// Mask tells which files are there.
func (f *FDs) Mask() uint32 {
	var m uint32
	for i, fd := range f {
		if fd >= 0 {
			m |= 1 << i
		}
	}
	return m
}

// List returns the files that are there, in order.
func (f *FDs) List() []int {
	var l []int
	for _, fd := range f {
		if fd >= 0 {
			l = append(l, fd)
		}
	}
	return l
}

// Fill assigns fds to the indices of mask. It reports whether the numbers agree.
func (f *FDs) Fill(mask uint32, fds []int) bool {
	*f = NoFDs()
	if mask>>NumFDs != 0 {
		return false
	}
	for i := range f {
		if mask&(1<<i) == 0 {
			continue
		}
		if len(fds) == 0 {
			return false
		}
		f[i], fds = fds[0], fds[1:]
	}
	return len(fds) == 0
}

// Hello opens a connection: the versions that the client speaks.
type Hello struct{ Min, Max uint32 }

func (m *Hello) encode(e *Encoder) { e.U32(m.Min); e.U32(m.Max) }
func (m *Hello) decode(d *Decoder) { m.Min, m.Max = d.U32(), d.U32() }

// HelloReply says which version is spoken from here on, and who answers.
type HelloReply struct {
	Version           uint32
	Keeper, WorkerPID int
	Build             string
	Orphan            bool // the keeper is dead; this worker only copies logs until the next keeper takes over
}

func (m *HelloReply) encode(e *Encoder) {
	e.U32(m.Version)
	e.Int(m.Keeper)
	e.Int(m.WorkerPID)
	e.String(m.Build)
	e.Bool(m.Orphan)
}
func (m *HelloReply) decode(d *Decoder) {
	m.Version, m.Keeper, m.WorkerPID, m.Build, m.Orphan = d.U32(), d.Int(), d.Int(), d.String(), d.Bool()
}

// Clone is plan.Clone on the wire.
type Clone struct {
	Flags  uint64
	Parent bool
	Cgroup int
}

func (m *Clone) encode(e *Encoder) { e.U64(m.Flags); e.Bool(m.Parent); e.Int(m.Cgroup) }
func (m *Clone) decode(d *Decoder) { m.Flags, m.Parent, m.Cgroup = d.U64(), d.Bool(), d.Int() }

// Create travels with: the plan, Slots files, the files of Kept.
type Create struct {
	ID            string
	Clone         Clone
	TwoStage, TTY bool
	Slots         int
	Kept          uint32 // mask of FD indices; FDPid, FDStage* and FDState must not be in it
}

func (m *Create) encode(e *Encoder) {
	e.String(m.ID)
	m.Clone.encode(e)
	e.Bool(m.TwoStage)
	e.Bool(m.TTY)
	e.Int(m.Slots)
	e.U32(m.Kept)
}
func (m *Create) decode(d *Decoder) {
	m.ID = d.String()
	m.Clone.decode(d)
	m.TwoStage, m.TTY, m.Slots, m.Kept = d.Bool(), d.Bool(), d.Int(), d.U32()
	if m.Slots < 0 || m.Slots > MaxFDs {
		d.Fail()
	}
}

// Take travels with the files of Kept, FDPid among them.
type Take struct {
	ID   string
	PID  int
	TTY  bool
	Kept uint32
}

func (m *Take) encode(e *Encoder) {
	e.String(m.ID)
	e.Int(m.PID)
	e.Bool(m.TTY)
	e.U32(m.Kept)
}
func (m *Take) decode(d *Decoder) {
	m.ID, m.PID, m.TTY, m.Kept = d.String(), d.Int(), d.Bool(), d.U32()
}

// JournalFields has the output of a container sent to the journal, too, with
// these fields in its native protocol.
type JournalFields struct {
	ID     string
	Fields []byte
}

func (m *JournalFields) encode(e *Encoder) { e.String(m.ID); e.Bytes(m.Fields) }
func (m *JournalFields) decode(d *Decoder) { m.ID, m.Fields = d.String(), d.Bytes() }

// Journal answers KindJournal: lines that were not sent, since the worker
// began, and whether its socket leads nowhere.
type Journal struct {
	Dropped uint64
	Broken  bool
}

func (m *Journal) encode(e *Encoder) { e.U64(m.Dropped); e.Bool(m.Broken) }
func (m *Journal) decode(d *Decoder) { m.Dropped, m.Broken = d.U64(), d.Bool() }

// ID names the container of a request.
type ID struct{ ID string }

func (m *ID) encode(e *Encoder) { e.String(m.ID) }
func (m *ID) decode(d *Decoder) { m.ID = d.String() }

// Exec travels with: the plan, Slots files, the status pipe's read end.
type Exec struct {
	Container      string
	Clone          Clone
	TwoStage, Hold bool
	Slots          int
	Status         bool
	Term           bool // since version 2; a worker of before does not look at it
}

func (m *Exec) encode(e *Encoder) {
	e.String(m.Container)
	m.Clone.encode(e)
	e.Bool(m.TwoStage)
	e.Bool(m.Hold)
	e.Int(m.Slots)
	e.Bool(m.Status)
	e.Bool(m.Term)
}
func (m *Exec) decode(d *Decoder) {
	m.Container = d.String()
	m.Clone.decode(d)
	m.TwoStage, m.Hold, m.Slots, m.Status = d.Bool(), d.Bool(), d.Int(), d.Bool()
	m.Term = len(d.B) > 0 && d.Bool()
	if m.Slots < 0 || m.Slots > MaxFDs {
		d.Fail()
	}
}

// Attach travels with a pipe for each stream that is wanted.
type Attach struct {
	ID             string
	Stdout, Stderr bool
	Lossless       bool
}

func (m *Attach) encode(e *Encoder) {
	e.String(m.ID)
	e.Bool(m.Stdout)
	e.Bool(m.Stderr)
	e.Bool(m.Lossless)
}
func (m *Attach) decode(d *Decoder) {
	m.ID, m.Stdout, m.Stderr, m.Lossless = d.String(), d.Bool(), d.Bool(), d.Bool()
}

// Flag is a request about a container (or none) with one switch: SetLog and
// Upgrade: a file comes along; Delete: kill it first.
type Flag struct {
	ID string
	On bool
}

func (m *Flag) encode(e *Encoder) { e.String(m.ID); e.Bool(m.On) }
func (m *Flag) decode(d *Decoder) { m.ID, m.On = d.String(), d.Bool() }

// Exit is how a child ended.
type Exit struct {
	ID             string
	PID            int
	Status, Signal int
	Time           int64
	Unknown        bool
}

func (m *Exit) encode(e *Encoder) {
	e.String(m.ID)
	e.Int(m.PID)
	e.Int(m.Status)
	e.Int(m.Signal)
	e.I64(m.Time)
	e.Bool(m.Unknown)
}
func (m *Exit) decode(d *Decoder) {
	m.ID, m.PID, m.Status, m.Signal, m.Time, m.Unknown =
		d.String(), d.Int(), d.Int(), d.Int(), d.I64(), d.Bool()
}

// Entry is a container. Between keeper and worker its files travel along,
// named by Mask.
type Entry struct {
	ID      string
	PID     int
	TTY     bool
	Started bool
	Adopted bool // not a child of this keeper: the one that cloned it was killed
	Exit    *Exit
	Mask    uint32
	Dropped uint64 // output bytes that could not be logged (worker → daemon)
}

func (m *Entry) encode(e *Encoder) {
	e.String(m.ID)
	e.Int(m.PID)
	e.Bool(m.TTY)
	e.Bool(m.Started)
	e.Bool(m.Adopted)
	e.Bool(m.Exit != nil)
	if m.Exit != nil {
		m.Exit.encode(e)
	}
	e.U32(m.Mask)
	e.U64(m.Dropped)
}
func (m *Entry) decode(d *Decoder) {
	m.ID, m.PID, m.TTY, m.Started, m.Adopted = d.String(), d.Int(), d.Bool(), d.Bool(), d.Bool()
	m.Exit = nil
	if d.Bool() {
		m.Exit = new(Exit)
		m.Exit.decode(d)
	}
	m.Mask, m.Dropped = d.U32(), d.U64()
}

// Entries is one part of a list.
type Entries struct{ List []Entry }

func (m *Entries) encode(e *Encoder) {
	e.Int(len(m.List))
	for i := range m.List {
		m.List[i].encode(e)
	}
}
func (m *Entries) decode(d *Decoder) {
	n := d.Int()
	m.List = nil
	for i := 0; i < n && d.Err() == nil; i++ {
		var x Entry
		x.decode(d)
		if d.Err() == nil {
			m.List = append(m.List, x)
		}
	}
	if n < 0 {
		d.Fail()
	}
}

// Reply answers a request. A failure has Failed, Class and Text, and Record
// if the failure was reported by a plan.
type Reply struct {
	Failed bool
	Class  errs.Class
	Text   string
	Record []byte // plan record of the failed operation
	More   bool   // a further reply to the same request follows
	Body   []byte
}

func (m *Reply) encode(e *Encoder) {
	e.Bool(m.Failed)
	e.U8(uint8(m.Class))
	e.String(m.Text)
	e.Bytes(m.Record)
	e.Bool(m.More)
	e.Bytes(m.Body)
}
func (m *Reply) decode(d *Decoder) {
	m.Failed, m.Class, m.Text = d.Bool(), errs.Class(d.U8()), d.String()
	m.Record, m.More, m.Body = d.Bytes(), d.Bool(), d.Bytes()
	if m.Class > errs.Unimplemented {
		m.Class = errs.Internal
	}
}

// EncodeBody encodes a body without a header, for Reply.Body.
func EncodeBody(b Body) []byte {
	var e Encoder
	b.encode(&e)
	return e.B
}

// Created is the body of the answer to Create and Exec; a pidfd comes along.
type Created struct{ PID int }

func (m *Created) encode(e *Encoder) { e.Int(m.PID) }
func (m *Created) decode(d *Decoder) { m.PID = d.Int() }

// Mask is the body of the answer to Files.
type Mask struct {
	Mask uint32
	TTY  bool
	PID  int
}

func (m *Mask) encode(e *Encoder) { e.U32(m.Mask); e.Bool(m.TTY); e.Int(m.PID) }
func (m *Mask) decode(d *Decoder) { m.Mask, m.TTY, m.PID = d.U32(), d.Bool(), d.Int() }

// FDChange names one kept file (SetFD, DropFD).
type FDChange struct {
	ID    string
	Which int
}

func (m *FDChange) encode(e *Encoder) { e.String(m.ID); e.Int(m.Which) }
func (m *FDChange) decode(d *Decoder) {
	m.ID, m.Which = d.String(), d.Int()
	if m.Which < 0 || m.Which >= NumFDs {
		d.Fail()
	}
}

// ValidID reports whether id may name a container here: it becomes the name of
// a file. Naru's own are 64 hexadecimal digits.
func ValidID(id string) bool {
	if id == "" || len(id) > 128 || id[0] == '.' || id[0] == '-' {
		return false
	}
	for _, c := range []byte(id) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return true
}

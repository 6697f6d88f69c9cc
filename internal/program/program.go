// Package program holds the words that sandbox and runtime share about programs
// of the host, such as network plugins, as plain data.
package program

// Request asks for a program to be run to its end.
type Request struct {
	Path  string
	Env   []string // all of it; nothing is inherited
	Stdin []byte
	// MaxOutput is how many bytes of standard output are accepted; a program
	// that prints more is ended.
	MaxOutput int
}

// Result is how a program ended.
type Result struct {
	Stdout []byte
	Stderr []byte // the first KiB
	Status int    // exit status
	Signal int    // that ended it; 0 = none
}

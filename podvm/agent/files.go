package agent

import "google.golang.org/protobuf/proto"

// What a set of files may hold: so many files, directories and links, and so many bytes of content.
const (
	FilesMax  = 65536
	FilesSize = 64 << 20
)

// What the end of a container brings of files that it wrote: so many bytes of one file, of all of them, and so
// many files. Together they fit in a message of ttrpc's.
const (
	WrittenMax   = 1 << 20
	WrittenAll   = 3 << 20
	WrittenFiles = 1024
)

// PieceSize is how many bytes of files travel in one message, unless one file alone has more: a
// message of ttrpc's takes 4 MiB.
const PieceSize = 1 << 20

// Pieces splits a set into what the Files calls that bring it have each, in this order.
func (f *Files) Pieces() []*Files {
	var all []*Files
	first, size := 0, 0
	cut := func(end int) {
		all = append(all, &Files{
			Name: f.Name, Single: f.Single, Writeback: f.Writeback,
			Files: f.Files[first:end], Before: uint32(first), More: end < len(f.Files),
		})
		first, size = end, 0
	}
	for i, one := range f.Files {
		n := proto.Size(one)
		if size > 0 && size+n > PieceSize {
			cut(i)
		}
		size += n
	}
	cut(len(f.Files))
	return all
}

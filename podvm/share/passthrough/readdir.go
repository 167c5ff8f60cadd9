package passthrough

import (
	"github.com/hanwen/go-fuse/v2/fuse"
)

// ReadDir lists a directory.
func (f *FS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(in, int(in.Size), func(_ place, e fuse.DirEntry) bool { return out.AddDirEntry(e) })
}

// ReadDirPlus lists a directory and looks its entries up. Those that it delivers count as looked
// up, but "." and "..", and what has gone meanwhile or can't be opened.
func (f *FS) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	// An entry takes about four times what it takes in the kernel's list.
	return f.list(in, int(in.Size/4), func(dir place, e fuse.DirEntry) bool {
		to := out.AddDirLookupEntry(e)
		if to == nil {
			return false
		}
		if dots(e.Name) {
			return true
		}
		// The answer is the guest's memory, of which nothing may be read back.
		var entry fuse.EntryOut
		if f.lookup(dir, e.Name, &entry) == nil {
			*to = entry
		}
		return true
	})
}

func dots(name string) bool { return name == "." || name == ".." }

func (f *FS) list(in *fuse.ReadIn, step int, add func(dir place, e fuse.DirEntry) bool) fuse.Status {
	h, err := f.handles.get(in.Fh, directory)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer h.put()
	d := h.dir
	const longest = 1 << 10 // an entry with the longest name is less
	step = min(max(step, longest), direntBuffer)
	added := false
	err = d.list(h.fd, int64(in.Offset), step, func(e fuse.DirEntry) bool {
		e.Ino = f.inode(d.dev, e.Ino)
		if e.Name == ".." && d.root != 0 {
			e.Ino = d.root // what is above is not the guest's
		}
		ok := add(place{h.fd, d.node, d.mount}, e)
		added = added || ok
		return ok
	})
	if err != nil && !added {
		return fuse.ToStatus(err)
	}
	return fuse.OK
}

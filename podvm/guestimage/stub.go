package guestimage

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// systemd is the library by which crun asks systemd for cgroups. There is no systemd in a guest, and the
// library brings five others, which are most of what the dynamic linker has to do in each run of crun.
const systemd = "libsystemd.so.0"

// stub returns a library of that name with all functions that the program imports from it, each of which
// returns -ENOSYS. Source of the format: the System V ABI, and the Linux Standard Base for versions.
func stub(program []byte, soname string) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return nil, err
	}
	all, err := f.ImportedSymbols()
	if err != nil {
		return nil, fmt.Errorf("its symbols: %w", err)
	}
	all = slices.DeleteFunc(all, func(s elf.ImportedSymbol) bool { return s.Library != soname })
	if len(all) == 0 {
		return nil, fmt.Errorf("it imports nothing from %s", soname)
	}
	s := library{strings: []byte{0}}
	s.define(soname, all)
	return s.link(), nil
}

// library is a shared library in the making.
type library struct {
	strings []byte
	soname  uint32
	symbols []elf.Sym64
	version []uint16 // of each symbol
	defined []byte   // Elf64_Verdef, each with its Elf64_Verdaux
	count   int      // of them
}

// string adds a string and returns its place.
func (l *library) string(s string) uint32 {
	at := len(l.strings)
	l.strings = append(append(l.strings, s...), 0)
	return uint32(at)
}

// Indexes of versions: the library itself is 1, and what follows are versions of symbols.
const ownVersion = 1

func (l *library) define(soname string, all []elf.ImportedSymbol) {
	l.soname = l.string(soname)
	var versions []string
	l.symbols, l.version = []elf.Sym64{{}}, []uint16{0}
	for _, s := range all {
		at := ownVersion
		if s.Version != "" {
			if !slices.Contains(versions, s.Version) {
				versions = append(versions, s.Version)
			}
			at = ownVersion + 1 + slices.Index(versions, s.Version)
		}
		l.symbols = append(l.symbols, elf.Sym64{Name: l.string(s.Name), Info: elf.ST_INFO(elf.STB_GLOBAL, elf.STT_FUNC), Shndx: 1})
		l.version = append(l.version, uint16(at))
	}
	l.defineVersion(soname, l.soname, elf.VER_FLG_BASE, len(versions) == 0)
	for i, v := range versions {
		l.defineVersion(v, l.string(v), 0, i == len(versions)-1)
	}
}

// verdef is an Elf64_Verdef with the one Elf64_Verdaux that it has.
type verdef struct {
	Version, Flags, Index, Names uint16
	Hash, Aux, Next              uint32
	Name, NextName               uint32
}

func (l *library) defineVersion(name string, at uint32, flags elf.DynamicVersionFlag, last bool) {
	l.count++
	v := verdef{Version: 1, Flags: uint16(flags), Index: uint16(l.count), Names: 1, Hash: hash(name), Aux: 20, Next: 28, Name: at}
	if last {
		v.Next = 0
	}
	l.defined = pack(l.defined, v)
}

// hash is that of the System V ABI.
func hash(name string) uint32 {
	var h uint32
	for i := range len(name) {
		h = h<<4 + uint32(name[i])
		h = (h ^ h&0xf0000000>>24) &^ 0xf0000000
	}
	return h
}

func pack(b []byte, v any) []byte {
	b, err := binary.Append(b, binary.LittleEndian, v)
	if err != nil {
		panic(err) // the types are of a fixed size
	}
	return b
}

const page = 4096

// link lays the library out: one segment to read and run, and one, which the dynamic linker writes to.
func (l *library) link() []byte {
	var header elf.Header64
	var programs [4]elf.Prog64
	out := make([]byte, binary.Size(header)+binary.Size(programs))
	dynamic := []elf.Dyn64{{Tag: int64(elf.DT_SONAME), Val: uint64(l.soname)}, {Tag: int64(elf.DT_STRSZ), Val: uint64(len(l.strings))}, {Tag: int64(elf.DT_SYMENT), Val: elf.Sym64Size}, {Tag: int64(elf.DT_VERDEFNUM), Val: uint64(l.count)}}
	add := func(tag elf.DynTag, data []byte) {
		out = append(out, make([]byte, -len(out)&15)...)
		dynamic = append(dynamic, elf.Dyn64{Tag: int64(tag), Val: uint64(len(out))})
		out = append(out, data...)
	}
	// One bucket, which is a chain of all symbols.
	chain := []uint32{1, uint32(len(l.symbols)), 1, 0}
	for i := range l.symbols[1:] {
		chain = append(chain, uint32(i+2)%uint32(len(l.symbols)))
	}
	add(elf.DT_HASH, pack(nil, chain))
	add(elf.DT_STRTAB, l.strings)
	add(elf.DT_VERSYM, pack(nil, l.version))
	add(elf.DT_VERDEF, l.defined)
	size := uint64(len(l.symbols) * elf.Sym64Size)
	code := uint64(len(out)+15)&^15 + size
	for i := range l.symbols[1:] {
		l.symbols[i+1].Value = code
	}
	add(elf.DT_SYMTAB, pack(nil, l.symbols))
	out = append(out, 0xb8, 0xda, 0xff, 0xff, 0xff, 0xc3) // mov eax, -ENOSYS; ret

	text := uint64(len(out))
	out = append(out, make([]byte, -len(out)&(page-1))...)
	at := uint64(len(out))
	out = pack(out, append(dynamic, elf.Dyn64{}))
	data := uint64(len(out)) - at

	programs = [4]elf.Prog64{
		{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Filesz: text, Memsz: text, Align: page},
		{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_W), Off: at, Vaddr: at, Paddr: at, Filesz: data, Memsz: data, Align: page},
		{Type: uint32(elf.PT_DYNAMIC), Flags: uint32(elf.PF_R | elf.PF_W), Off: at, Vaddr: at, Paddr: at, Filesz: data, Memsz: data, Align: 8},
		{Type: uint32(elf.PT_GNU_STACK), Flags: uint32(elf.PF_R | elf.PF_W), Align: 16}, // without it the stack is made executable
	}
	header = elf.Header64{
		Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: uint64(binary.Size(header)), Ehsize: uint16(binary.Size(header)), Phentsize: uint16(binary.Size(programs[0])), Phnum: uint16(len(programs)),
	}
	copy(header.Ident[:], elf.ELFMAG+strings.Repeat("\x00", elf.EI_NIDENT-4))
	header.Ident[elf.EI_CLASS], header.Ident[elf.EI_DATA], header.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	copy(out, pack(pack(nil, header), programs))
	return out
}

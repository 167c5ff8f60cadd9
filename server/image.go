package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/caisson-vm/caisson/imagestore"
)

// PullImage pulls an image and returns its id.
func (s *imageService) PullImage(ctx context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	ref, err := imageRef(r.GetImage())
	if err != nil {
		return nil, err
	}
	credentials, err := auth(r.GetAuth())
	if err != nil {
		return nil, err
	}
	image, err := s.o.Images.Pull(ctx, ref, credentials)
	if err != nil {
		return nil, pullError(err)
	}
	return &cri.PullImageResponse{ImageRef: image.ID}, nil
}

// pullError marks the two failures that the kubelet tells apart for the pod's events. It knows
// them by how the text of an error without a code begins.
func pullError(err error) error {
	switch {
	case errors.Is(err, imagestore.ErrRejected):
		return status.Error(codes.Unknown, crierrors.ErrSignatureValidationFailed.Error()+": "+err.Error())
	case errdefs.IsUnavailable(err):
		return status.Error(codes.Unknown, crierrors.ErrRegistryUnavailable.Error()+": "+err.Error())
	}
	return err
}

// ListImages lists all images, or the one that the filter names.
func (s *imageService) ListImages(_ context.Context, r *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	images, err := s.listImages(r.GetFilter())
	return &cri.ListImagesResponse{Images: images}, err
}

// StreamImages is ListImages in pieces.
func (s *imageService) StreamImages(r *cri.StreamImagesRequest, out grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	images, err := s.listImages(r.GetFilter())
	if err != nil {
		return err
	}
	return inPieces(images, func(piece []*cri.Image) error {
		return out.Send(&cri.StreamImagesResponse{Images: piece})
	})
}

func (s *imageService) listImages(f *cri.ImageFilter) ([]*cri.Image, error) {
	if ref := f.GetImage().GetImage(); ref != "" {
		image, err := s.o.Images.Image(ref)
		if err != nil {
			return nil, ignoreNotFound(err)
		}
		return []*cri.Image{criImage(image)}, nil
	}
	var all []*cri.Image
	for _, i := range s.o.Images.Images() {
		all = append(all, criImage(i))
	}
	return all, nil
}

// ImageStatus returns an image; none, and no error, when it is not here.
func (s *imageService) ImageStatus(_ context.Context, r *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	ref, err := imageRef(r.GetImage())
	if err != nil {
		return nil, err
	}
	image, err := s.o.Images.Image(ref)
	if errdefs.IsNotFound(err) {
		return &cri.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	resp := &cri.ImageStatusResponse{Image: criImage(image)}
	if r.GetVerbose() {
		config, err := s.o.Images.Config(image.ID)
		if err != nil {
			return nil, err
		}
		resp.Info, err = encode(map[string]any{"info": map[string]any{
			"imageSpec": json.RawMessage(config),
			"pulled":    image.Pulled,
		}})
		if err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// RemoveImage removes an image with all its names. One that is gone is removed.
func (s *imageService) RemoveImage(ctx context.Context, r *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	ref, err := imageRef(r.GetImage())
	if err != nil {
		return nil, err
	}
	return &cri.RemoveImageResponse{}, ignoreNotFound(s.o.Images.Remove(ctx, ref))
}

// ImageFsInfo tells what images, and pods' own files, take on their file system. It is one, and there are kubelets
// that take two names for two.
func (s *imageService) ImageFsInfo(context.Context, *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	images, err := s.o.Images.Usage()
	if err != nil {
		return nil, fmt.Errorf("usage of images: %w", err)
	}
	own, removed, err := podUsage(s.o.Root)
	if err != nil {
		return nil, fmt.Errorf("usage of pods: %w", err)
	}
	return &cri.ImageFsInfoResponse{
		ImageFilesystems:     []*cri.FilesystemUsage{filesystem(images.Path, images.Bytes+removed.bytes, images.Inodes+removed.inodes)},
		ContainerFilesystems: []*cri.FilesystemUsage{filesystem(images.Path, own.bytes, own.inodes)},
	}, nil
}

func filesystem(path string, bytes, inodes uint64) *cri.FilesystemUsage {
	return &cri.FilesystemUsage{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &cri.FilesystemIdentifier{Mountpoint: path},
		UsedBytes:  number(bytes),
		InodesUsed: number(inodes),
	}
}

// usage is what files really take on a disk.
type usage struct{ bytes, inodes uint64 }

func (u *usage) add(st *syscall.Stat_t) {
	u.bytes += uint64(st.Blocks) * 512
	u.inodes++
}

// podUsage counts the files below the folder of pods, each once: the pods' own, and those of images
// that were removed from the store and live on by the links of pods. Those of other images are counted
// in the store. What is missing takes nothing: pods come and go meanwhile.
func podUsage(folder string) (own, removed usage, err error) {
	links := map[uint64]uint64{} // of images, by inode: how many are here
	err = filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return ignoreGone(err)
		}
		info, err := d.Info()
		if err != nil {
			return ignoreGone(err)
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		switch {
		case !ok:
		case !info.Mode().IsRegular() || filepath.Ext(path) != ".erofs":
			own.add(st)
		default:
			if links[st.Ino]++; links[st.Ino] == uint64(st.Nlink) {
				removed.add(st)
			}
		}
		return nil
	})
	return own, removed, err
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// imageRef is the name or id of the image that is meant.
func imageRef(spec *cri.ImageSpec) (string, error) {
	ref := spec.GetImage()
	if ref == "" {
		return "", invalid("the image's name is missing")
	}
	if err := checkHandler(spec.GetRuntimeHandler()); err != nil {
		return "", err
	}
	return ref, checkText("image", ref)
}

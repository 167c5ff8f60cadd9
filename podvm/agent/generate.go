package agent

//go:generate protoc -I. --go_out=paths=source_relative:. --go-ttrpc_out=paths=source_relative:. agent.proto

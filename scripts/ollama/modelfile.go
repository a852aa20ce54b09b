// Reads a Modelfile on stdin as Ollama does, and prints its commands as JSON: the state machine of ollama v0.6,
// parser/parser.go, ParseFile (MIT License, copyright Ollama), without its checks of names.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

type command struct{ Name, Args string }

const (
	atNil = iota
	atName
	atValue
	atParameter
	atComment
)

func isAlpha(r rune) bool   { return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' }
func isNumber(r rune) bool  { return r >= '0' && r <= '9' }
func isSpace(r rune) bool   { return r == ' ' || r == '\t' }
func isNewline(r rune) bool { return r == '\r' || r == '\n' }

func unquote(s string) (string, bool) {
	if len(s) >= 3 && s[:3] == `"""` {
		if len(s) >= 6 && s[len(s)-3:] == `"""` {
			return s[3 : len(s)-3], true
		}
		return "", false
	}
	if len(s) >= 1 && s[0] == '"' {
		if len(s) >= 2 && s[len(s)-1] == '"' {
			return s[1 : len(s)-1], true
		}
		return "", false
	}
	return s, true
}

func step(r rune, state int) (int, rune, error) {
	switch state {
	case atNil:
		switch {
		case r == '#':
			return atComment, 0, nil
		case isSpace(r), isNewline(r):
			return atNil, 0, nil
		}
		return atName, r, nil
	case atName:
		switch {
		case isAlpha(r):
			return atName, r, nil
		case isSpace(r):
			return atValue, 0, nil
		}
		return atNil, 0, errors.New("no command")
	case atValue:
		if isNewline(r) || isSpace(r) {
			return atNil, r, nil
		}
		return atValue, r, nil
	case atParameter:
		switch {
		case isAlpha(r), isNumber(r), r == '_':
			return atParameter, r, nil
		case isSpace(r):
			return atValue, 0, nil
		}
		return atNil, 0, io.ErrUnexpectedEOF
	}
	if isNewline(r) {
		return atNil, 0, nil
	}
	return atComment, 0, nil
}

func parse(input *bufio.Reader) []command {
	var now command
	var read bytes.Buffer
	var found []command
	state := atNil
	for {
		char, _, err := input.ReadRune()
		if err != nil {
			break
		}
		next, char, err := step(char, state)
		if err != nil {
			panic(err)
		}
		if next != state {
			whole := true
			switch state {
			case atName:
				now.Name = strings.ToLower(read.String())
				if now.Name == "parameter" {
					next = atParameter
				}
			case atParameter:
				now.Name = read.String()
			case atValue:
				value, ok := unquote(strings.TrimSpace(read.String()))
				if whole = ok && !isSpace(char); whole {
					now.Args = value
					found = append(found, now)
				} else {
					read.WriteRune(char)
				}
			}
			if !whole {
				continue
			}
			read.Reset()
			state = next
		}
		if strconv.IsPrint(char) {
			read.WriteRune(char)
		}
	}
	if state == atValue {
		value, ok := unquote(strings.TrimSpace(read.String()))
		if !ok {
			panic("a value without an end")
		}
		now.Args = value
		found = append(found, now)
	}
	return found
}

func main() {
	text, err := json.Marshal(parse(bufio.NewReader(os.Stdin)))
	if err != nil {
		panic(err)
	}
	fmt.Println(string(text))
}

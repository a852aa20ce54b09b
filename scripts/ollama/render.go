// Renders templates with Go's text/template as Ollama does: a JSON object per line in, one per line out.
//
//	{"template": "...", "messages": [{"role": "user", "content": "..."}]}  ->  {"text": "..."} or {"error": "..."}
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type task struct {
	Template string     `json:"template"`
	Messages []*message `json:"messages"`
}

func render(one task) map[string]string {
	parsed, err := template.New("").Option("missingkey=zero").Parse(one.Template)
	if err != nil {
		return map[string]string{"error": err.Error()}
	}
	var text strings.Builder
	values := map[string]any{"Messages": one.Messages, "System": "", "Tools": nil, "Response": ""}
	if err := parsed.Execute(&text, values); err != nil {
		return map[string]string{"error": err.Error()}
	}
	return map[string]string{"text": text.String()}
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(make([]byte, 1<<20), 1<<26)
	for lines.Scan() {
		var one task
		if err := json.Unmarshal(lines.Bytes(), &one); err != nil {
			panic(err)
		}
		answer, err := json.Marshal(render(one))
		if err != nil {
			panic(err)
		}
		fmt.Println(string(answer))
	}
}

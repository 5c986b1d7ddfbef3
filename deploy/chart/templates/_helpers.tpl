{{/* Names, labels and what the config says. A helper that gives more than a text gives JSON: read
     it with fromJson. */}}

{{- define "loraplex.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}
  {{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end -}}

{{- define "loraplex.selector" -}}
{{- $app := default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
app.kubernetes.io/name: {{ $app | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "loraplex.labels" -}}
{{ include "loraplex.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "loraplex.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
  {{- default (include "loraplex.fullname" .) .Values.serviceAccount.name }}{{ else }}
  {{- default "default" .Values.serviceAccount.name }}{{ end -}}
{{- end -}}

{{/* The config file as given: a map, or the text of a file (--set-file config=...). Of the manifest
     of a RayService, which may stand among others or in a List, what is in it. */}}
{{- define "loraplex.given" -}}
{{- $given := .Values.config -}}
{{- $all := list $given -}}
{{- if kindIs "string" $given -}}
{{- $all = list -}}
{{- range regexSplit "(?m)^---([ \\t\\r].*)?$" $given -1 }}{{ with fromYaml . }}
  {{- $all = append $all . }}{{ end }}{{ end -}}
{{- end -}}
{{- range $all -}}
{{- if and (hasKey . "Error") (kindIs "string" $given) }}
  {{- fail (printf "config: is no YAML: %s" .Error) }}{{ end -}}
{{- if eq (toString .kind) "List" }}{{ $all = concat $all (.items | default list) }}{{ end -}}
{{- end -}}
{{- $found := last $all | default dict -}}
{{- range $all }}{{ if .kind }}{{ with (.spec | default dict).serveConfigV2 -}}
{{- $found = . }}{{ if kindIs "string" . }}{{ $found = fromYaml . }}{{ end -}}
{{- end }}{{ end }}{{ end -}}
{{- if hasKey $found "Error" }}{{ fail (printf "config: is no YAML: %s" $found.Error) }}{{ end -}}
{{- toJson $found -}}
{{- end -}}

{{/* Where models and gateway stand in it: the arguments of Ray's application, or the file. */}}
{{- define "loraplex.args" -}}
{{- $given := include "loraplex.given" . | fromJson -}}
{{- $args := $given -}}
{{- if $given.applications }}{{ $args = (first $given.applications).args | default dict }}{{ end -}}
{{- if kindIs "invalid" $args.gateway }}{{ $_ := set $args "gateway" $given.gateway }}{{ end -}}
{{- if not $args.llm_configs }}
  {{- fail (printf "%s, by --set-file config=FILE or below config: in the values"
    "config: has no llm_configs; give the file that `loraplex serve` takes") }}{{ end -}}
{{- range $args.llm_configs }}{{ if kindIs "string" . }}
  {{- fail (printf "config.llm_configs: %s is a file of its own; put its text in its place" .) }}
  {{- end }}{{ end -}}
{{- toJson $args -}}
{{- end -}}

{{/* The gateway section as pods run it: reachable from other pods, with the secrets of this
     release. */}}
{{- define "loraplex.gateway" -}}
{{- $given := (include "loraplex.args" . | fromJson).gateway | default dict -}}
{{- $link := $given.link | default dict -}}
{{- $peer := "tcp://0.0.0.0:9760" -}}
{{- if or (eq (toString $link.peer) "off") (eq (toString $link.peer) "false") }}{{ $peer = "off" }}
  {{- end -}}
{{- $ours := dict "host" "0.0.0.0" "port" 8000 "processes" 1 "state_dir"
    "/var/lib/loraplex/state" -}}
{{- $_ := set $ours "link" (dict "control" "tcp://0.0.0.0:9750" "data" "tcp://0.0.0.0:9751" "peer"
    $peer "secret_env" ($link.secret_env | default "LORAPLEX_LINK_SECRET") "insecure" false) -}}
{{- range $key, $values := dict "api_keys_env" .Values.apiKeys
    "admin_keys_env" .Values.adminKeys -}}
{{- if or $values.existingSecret $values.values }}
  {{- $_ := set $ours $key (get $given $key | default
    (ternary "LORAPLEX_API_KEYS" "LORAPLEX_ADMIN_KEYS" (eq $key "api_keys_env"))) }}
{{- else if get $given $key }}
  {{- $value := ternary "apiKeys" "adminKeys" (eq $key "api_keys_env") -}}
  {{- fail (printf "config.gateway.%s: name the Secret that holds the keys in %s, or give %s" $key
    (printf "%s.existingSecret" $value) (printf "%s.values" $value)) }}{{ end -}}
{{- end -}}
{{- if .Values.keysFile.existingSecret }}
  {{- $_ := set $ours "keys_file" (printf "/etc/loraplex/keys/%s" .Values.keysFile.key) }}{{ end -}}
{{- toJson (mergeOverwrite (deepCopy $given) $ours) -}}
{{- end -}}

{{/* The file that all pods read. JSON is YAML, and keeps large whole numbers whole. */}}
{{- define "loraplex.file" -}}
{{- $file := include "loraplex.given" . | fromJson -}}
{{- $args := $file -}}
{{- if $file.applications }}
  {{- $args = (first $file.applications).args }}{{ $_ := unset $file "gateway" }}{{ end -}}
{{- $_ := set $args "gateway" (include "loraplex.gateway" . | fromJson) -}}
{{- toPrettyJson $file -}}
{{- end -}}

{{/* Each model: its id, the name of its workload, its values, and what the config says of its
     workers. */}}
{{- define "loraplex.models" -}}
{{- $root := . -}}
{{- $found := list -}}
{{- $ids := list -}}
{{- range (include "loraplex.args" . | fromJson).llm_configs -}}
{{- $id := (.model_loading_config | default dict).model_id -}}
{{- if not (kindIs "string" $id) }}
  {{- fail "config: each of llm_configs needs a model_loading_config.model_id, as text" }}
  {{- end -}}
{{- if contains "${" $id }}
  {{- fail (printf "config: model %s: the chart must know the model_id; write it out" $id) }}
  {{- end -}}
{{- $ids = append $ids $id -}}
{{- $slug := regexReplaceAll "[^a-z0-9]+" (lower $id) "-" | trunc 24 | trimAll "-" -}}
{{- if ne $slug $id }}{{ $slug = printf "%s-%s" $slug (sha256sum $id | trunc 6) | trimPrefix "-" }}
  {{- end -}}
{{- $values := mergeOverwrite (deepCopy $root.Values.workers)
    (get $root.Values.models $id | default dict) -}}
{{- $engine := .engine_kwargs | default dict -}}
{{- $deployment := .deployment_config | default dict -}}
{{- $numbers := dict "scaling" (pick ($deployment.autoscaling_config | default dict) "min_replicas"
    "max_replicas" "initial_replicas" "target_ongoing_requests" "upscale_delay_s"
    "downscale_delay_s" "downscale_to_zero_delay_s")
    "engine" (pick $engine "tensor_parallel_size" "pipeline_parallel_size" "max_num_seqs")
    "deployment" (pick $deployment "num_replicas" "max_ongoing_requests") -}}
{{- range $numbers }}{{ range $key, $value := . }}
  {{- if and (kindIs "string" $value) (ne $value "auto") }}
  {{- fail (printf "config: model %s: %s is the text %q, and the chart must know the number; %s" $id
    $key $value "write it out") }}{{ end }}{{ end }}{{ end -}}
{{- $sim := eq (lower (.llm_engine | default "vLLM")) "sim" -}}
{{- $gpus := mul (int ($engine.tensor_parallel_size | default 1))
    (int ($engine.pipeline_parallel_size | default 1)) -}}
{{- $kind := toString (.accelerator_config | default dict).kind -}}
{{- if or (eq $kind "cpu") (and $sim (ne $kind "gpu")) }}{{ $gpus = 0 }}{{ end -}}
{{- $scaling := $deployment.autoscaling_config -}}
{{- if eq (toString $deployment.num_replicas) "auto" }}
  {{- $scaling = merge (dict) ($scaling | default dict) (dict "max_replicas" 100
    "target_ongoing_requests" 2) }}{{ end -}}
{{- $least := 1 -}}{{- $most := 1 -}}{{- $first := int (ternary 1
    ($deployment.num_replicas | default 1) (kindIs "string" $deployment.num_replicas)) -}}
{{- $atOnce := int ($engine.max_num_seqs | default ($engine.sim | default dict).max_num_seqs
    | default 256) -}}
{{- $atOnce = min $atOnce (int ($deployment.max_ongoing_requests | default 1000000000)) -}}
{{- $target := maxf 1 (divf (mulf $atOnce 7) 10) -}}
{{- if $scaling -}}
{{- $least = int (ternary 1 $scaling.min_replicas (kindIs "invalid" $scaling.min_replicas)) -}}
{{- $most = int ($scaling.max_replicas | default 1) -}}
{{- $first = int (ternary $least $scaling.initial_replicas (kindIs "invalid"
    $scaling.initial_replicas)) -}}
{{- $target = $scaling.target_ongoing_requests | default $target -}}
{{- end -}}
{{- $scaling = $scaling | default dict -}}
{{- if gt $least $most }}
  {{- fail (printf "config: model %s: min_replicas (%d) is more than max_replicas (%d)" $id
    $least $most) }}{{ end -}}
{{- $scales := and (ne $root.Values.scaling.by "none") (lt $least $most) -}}
{{- if and (not $scales) (eq $first 0) }}
  {{- fail (printf "config: model %s would never have a worker: with min_replicas 0, %s" $id
    "let KEDA start them (scaling.by: keda)") }}{{ end -}}
{{- $label := "^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$" -}}
{{- if and $scales (eq $root.Values.scaling.by "hpa") (not (regexMatch $label $id)) }}
  {{- fail (printf "config: model %s: an HPA selects the metric by this id, and %s; %s" $id
    "a value there has letters, digits and . _ - alone"
    "choose another model_id, or scaling.by: keda") }}{{ end -}}
{{- $down := ternary 600 $scaling.downscale_delay_s (kindIs "invalid"
    $scaling.downscale_delay_s) -}}
{{- $found = append $found (dict
    "id" $id
    "slug" $slug
    "name" (printf "%s-%s" (include "loraplex.fullname" $root | trunc 20 | trimSuffix "-") $slug
      | trunc 50 | trimSuffix "-")
    "values" $values
    "gpus" $gpus
    "replicas" $first
    "least" $least
    "most" $most
    "scales" $scales
    "target" $target
    "upSeconds" (int (ternary 30 $scaling.upscale_delay_s
      (kindIs "invalid" $scaling.upscale_delay_s)))
    "downSeconds" (int $down)
    "toZeroSeconds" (int (ternary $down $scaling.downscale_to_zero_delay_s
      (kindIs "invalid" $scaling.downscale_to_zero_delay_s)))
  ) -}}
{{- end -}}
{{- range $id, $_ := .Values.models }}{{ if not (has $id $ids) }}
  {{- fail (printf "models.%s: the config has no model of this id (it has %s)" $id
    (join ", " $ids)) }}{{ end }}{{ end -}}
{{- toJson (dict "models" $found) -}}
{{- end -}}

{{- define "loraplex.image" -}}
{{- $image := .root.Values.image -}}
{{- if $image.registry }}{{ trimSuffix "/" $image.registry }}/{{ end }}
  {{- get $image .kind }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end -}}

{{/* Seconds that a draining process may take, as a whole number. */}}
{{- define "loraplex.drainSeconds" -}}
{{- $gateway := include "loraplex.gateway" . | fromJson -}}
{{- range $key, $value := pick $gateway "drain_s" "kill_s" }}{{ if kindIs "string" $value }}
  {{- fail (printf "config: gateway.%s is the text %q, and the chart must know the number; %s" $key
    $value "write it out") }}{{ end }}{{ end -}}
{{- $drain := ternary 20 $gateway.drain_s (kindIs "invalid" $gateway.drain_s) -}}
{{- $kill := ternary 5 $gateway.kill_s (kindIs "invalid" $gateway.kill_s) -}}
{{- ceil (addf $drain $kill) -}}
{{- end -}}

{{- define "loraplex.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "loraplex.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Variables of every pod: the link's secret and what opens the bucket. */}}
{{- define "loraplex.env" -}}
- name: HOME
  value: /var/lib/loraplex
- name: {{ (include "loraplex.gateway" . | fromJson).link.secret_env }}
  valueFrom: {secretKeyRef: {name: {{ include "loraplex.linkSecret" . }}, key: {{
      .Values.link.key }}}}
{{- if .Values.store.googleKey.existingSecret }}
- name: GOOGLE_APPLICATION_CREDENTIALS
  value: /etc/loraplex/google/{{ .Values.store.googleKey.key }}
{{- end }}
{{- end -}}

{{- define "loraplex.linkSecret" -}}
{{- .Values.link.existingSecret | default (printf "%s-link" (include "loraplex.fullname" .)) -}}
{{- end -}}

{{- define "loraplex.storeSecret" -}}
{{- if .Values.store.existingSecret }}{{ .Values.store.existingSecret }}
  {{- else if .Values.store.credentials }}{{ printf "%s-store" (include "loraplex.fullname" .) }}
  {{- end -}}
{{- end -}}

{{- define "loraplex.volumes" -}}
- name: config
  configMap: {name: {{ include "loraplex.fullname" . }}}
- name: tmp
  emptyDir: {}
{{- if .Values.store.googleKey.existingSecret }}
- name: google
  secret: {secretName: {{ .Values.store.googleKey.existingSecret }}}
{{- end }}
{{- end -}}

{{- define "loraplex.mounts" -}}
- {name: config, mountPath: /etc/loraplex/loraplex.yaml, subPath: loraplex.yaml, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if .Values.store.googleKey.existingSecret }}
- {name: google, mountPath: /etc/loraplex/google, readOnly: true}
{{- end }}
{{- end -}}

{{/* Pods of one kind on different hosts where there are several. */}}
{{- define "loraplex.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector: {matchLabels: {{ toJson . }}}
- maxSkew: 1
  topologyKey: topology.kubernetes.io/zone
  whenUnsatisfiable: ScheduleAnyway
  labelSelector: {matchLabels: {{ toJson . }}}
{{- end -}}

{{- define "loraplex.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "lorakit.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "lorakit.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "lorakit.labels" -}}
{{ include "lorakit.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* What PodSecurity's level "restricted" asks of a container, and a root that nothing can write to. */ -}}
{{- define "lorakit.closed" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Where either container finds what it reads, and the few places that it writes to. */ -}}
{{- define "lorakit.mounts" -}}
- {name: cache, mountPath: /var/cache/lorakit}
- {name: tmp, mountPath: /tmp}
- {name: shared-memory, mountPath: /dev/shm}
{{- if .Values.models.claim }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{- define "lorakit.environment" -}}
- {name: HOME, value: /var/cache/lorakit}
- {name: XDG_CACHE_HOME, value: /var/cache/lorakit}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /var/cache/lorakit/inductor}
{{- if .Values.hub.tokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .Values.hub.tokenSecret | quote }}, key: HF_TOKEN}
{{- end }}
{{- if not .Values.hub.enabled }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- end }}

{{- define "lorakit.health" -}}
exec:
  command:
    - python3
    - -c
    - import urllib.request as web; web.urlopen('http://127.0.0.1:8001/health', timeout=8)
timeoutSeconds: 10
{{- end }}
